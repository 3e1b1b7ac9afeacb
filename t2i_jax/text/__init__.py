"""From captions to ids on the host, and to features on the device.

A text is a frozen dataclass: called with n captions it gives ids int32 (n, s) and a mask bool (n, s), all False for an
empty caption. A frozen encoder also has `load() -> model` and `features(model, ids, mask) -> (b, s, k)`. One that knows
pictures too may have `image_features(model, images) -> (b, s, k)`, which stand in for those of captions in training.
What a text side does not read of a long caption `cut.Limited.cut` counts.
"""
