"""The self-attention multi-branch network (Munir and Micheloni, SpliTech 2020).

    ResNet, last stride 1 → self-attention after one stage → global pooling → 1×1 convolution = the feature
    feature → batch norm → ReLU → dropout → several linear classifiers, whose losses are added

With a BN neck (Luo et al., "Bag of Tricks and a Strong Baseline", CVPR workshops 2019, arXiv:1903.07071) the same batch
norm is the neck: the feature before it is for a triplet loss, the one after it for retrieval and, without the ReLU, for
the classifiers; as there, the neck has no shift and the classifiers have no bias.
"""

from typing import Any

from torch import Tensor, nn

from sabmn_ext.nn.attention import SelfAttention2d
from sabmn_ext.nn.batch_norm import followers, rescale, warn_about
from sabmn_ext.nn.layer_calls import convolve
from sabmn_ext.nn.resnet import ResNet, load_backbone_weights
from sabmn_ext.nn.spectral_norm import CONVOLUTIONS, layer_sigma, spectral_norm_model

POOLINGS = {"max": nn.AdaptiveMaxPool2d, "avg": nn.AdaptiveAvgPool2d}


class SABMN(nn.Module):
    """Features for retrieval in eval mode, a list of logits in train mode.

    Args:
        num_classes: training identities.
        backbone: resnet18, resnet34, resnet50, resnet101 or resnet152.
        attention_stage: 1, 2, 3 or 4: the stage that self-attention follows; None for no attention.
        num_classifiers: linear classifiers on the same feature.
        feature_dim: channels of the added 1×1 convolution.
        reduction: k of the attention, which works on channels/k.
        spectral_norm: normalise every convolution by its largest singular value (the classifiers are not). In eval
            mode a pretrained backbone goes on computing what it computed before (see ``spectral_norm_model``).
        dropout: probability of the one dropout layer that all classifiers share.
        last_stride: stride of the fourth stage.
        pooling: "max" or "avg", over all positions.
        feature_bias: whether the added 1×1 convolution has a bias.
        bn_neck: whether the feature for retrieval is the one after the batch norm, see above.
        weights: of the backbone: "imagenet" (downloaded once), "none" or None (random), or a file; see
            ``load_backbone_weights``.

    Shape:
        images [B, 3, H, W], normalised as ImageNet's → train mode: ``num_classifiers`` tensors [B, num_classes];
        eval mode: [B, feature_dim], the output of the 1×1 convolution or of the BN neck after it.

    Attributes:
        with_feature: set to True, train mode gives a pair: the logits, and the output of the 1×1 convolution.

    The added layers start as is usual in re-ID: the convolution from a Kaiming-normal distribution (fan out), the
    classifiers from a normal distribution of standard deviation 0.001 with zero bias.

    >>> network = sabmn_ext.SABMN(751, backbone="resnet18", weights="none")
    >>> network.eval()(torch.randn(2, 3, 256, 128)).shape
    torch.Size([2, 1024])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = "resnet50",
        attention_stage: int | None = 3,
        num_classifiers: int = 4,
        feature_dim: int = 1024,
        reduction: int = 8,
        spectral_norm: bool = True,
        dropout: float = 0.5,
        last_stride: int = 1,
        pooling: str = "max",
        feature_bias: bool = False,
        bn_neck: bool = False,
        weights: str | None = "imagenet",
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("num_classifiers", num_classifiers)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
        if attention_stage not in (None, 1, 2, 3, 4):
            raise ValueError(f"attention_stage is {attention_stage!r}, expected 1, 2, 3, 4 or None")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling '{pooling}' is unknown; expected one of {', '.join(POOLINGS)}")
        self.config: dict[str, Any] = {
            "num_classes": num_classes,
            "backbone": backbone,
            "attention_stage": attention_stage,
            "num_classifiers": num_classifiers,
            "feature_dim": feature_dim,
            "reduction": reduction,
            "spectral_norm": spectral_norm,
            "dropout": dropout,
            "last_stride": last_stride,
            "pooling": pooling,
            "feature_bias": feature_bias,
            "bn_neck": bn_neck,
        }
        self.backbone = ResNet(backbone, last_stride)
        load_backbone_weights(self.backbone, backbone, weights or "none")
        self.attention_stage = attention_stage
        self.attention = (
            SelfAttention2d(self.backbone.channels[attention_stage - 1], reduction) if attention_stage else None
        )
        self.pool = POOLINGS[pooling](1)
        self.feature = nn.Conv2d(self.backbone.channels[3], feature_dim, 1, bias=feature_bias)
        nn.init.kaiming_normal_(self.feature.weight, mode="fan_out")
        self.feature_norm = nn.BatchNorm1d(feature_dim)
        self.with_feature = False
        self.bn_neck = bn_neck
        if bn_neck:
            self.feature_norm.bias.requires_grad_(False)  # stays at 0
        self.relu = nn.Identity() if bn_neck else nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)
        classifiers = [nn.Linear(feature_dim, num_classes, bias=not bn_neck) for _ in range(num_classifiers)]
        for classifier in classifiers:
            nn.init.normal_(classifier.weight, std=0.001)
            if not bn_neck:
                nn.init.zeros_(classifier.bias)
        self.classifiers = nn.ModuleList(classifiers)
        if spectral_norm:
            self._normalize()

    def _normalize(self) -> None:
        """Normalise every convolution; only the backbone's have learned statistics behind them that must move along."""
        convolutions = {name: m for name, m in self.backbone.named_modules() if isinstance(m, CONVOLUTIONS)}
        following = followers(self.backbone, convolutions)
        spectral_norm_model(self, preserve_eval=False)
        warn_about(rescale({n: (convolutions[n], bn, layer_sigma(convolutions[n])) for n, bn in following.items()}))

    def forward(self, images: Tensor) -> Tensor | list[Tensor] | tuple[list[Tensor], Tensor]:
        x = self.backbone.stem(images)
        for number, stage in enumerate(self.backbone.stages, start=1):
            x = stage(x)
            if self.attention is not None and number == self.attention_stage:
                x = self.attention(x)
        feature = convolve(self.feature, self.pool(x)).flatten(1)  # [B, feature_dim]
        if not self.training:
            return self.feature_norm(feature) if self.bn_neck else feature  # type: ignore[no-any-return]
        shared = self.dropout(self.relu(self.feature_norm(feature)))
        logits = [classifier(shared) for classifier in self.classifiers]
        return (logits, feature) if self.with_feature else logits

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter once: of the pretrained ``backbone``, of the ``attention`` block, of the layers ``added``."""
        groups: dict[str, list[nn.Parameter]] = {"backbone": [], "attention": [], "added": []}
        for name, parameter in self.named_parameters():
            top = name.split(".")[0]
            groups[top if top in groups else "added"].append(parameter)
        return groups
