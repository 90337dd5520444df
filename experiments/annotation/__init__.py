"""Parts of the scripts that label pairs and revise responses."""
