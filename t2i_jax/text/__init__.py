"""From captions to ids on the host, and to features on the device.

A text side is a frozen dataclass that implements `core.conditions.Tokenizer`: called with n captions it returns ids
int32 (n, s) and a mask bool (n, s), all False for an empty caption, and its `spec` declares its other abilities. A
frozen encoder is a `TextEncoder`; one that also encodes images is an `ImageTextEncoder`, whose image features replace
those of captions in training. `cut.Limited` counts the tokens cut from a long caption.
"""
