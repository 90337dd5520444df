"""Parts that scripts share."""
