"""task -> engine -> loop: what one rank does with a batch."""
