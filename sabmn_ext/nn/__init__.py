"""The network: ResNet, self-attention block, spectral normalisation, SABMN."""
