"""The operations: one file each, with its schema, checks, dispatch and autograd. ``reference`` is the specification."""
