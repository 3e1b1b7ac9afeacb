"""The machinery of the site: its generated reference, drawings and equations."""
