"""From captions to ids on the host, and to features on the device.

A text is a frozen dataclass that offers what `core.types.Tokenizer` says: called with n captions it gives ids int32
(n, s) and a mask bool (n, s), all False for an empty caption, and its `spec` declares what else it can do. A frozen
encoder is a `TextEncoder`; one that knows images too is an `ImageTextEncoder`, whose features of images stand in for
those of captions in training. What a text does not read of a long caption `cut.Limited` counts.
"""
