"""One page that says what runs showed, made from their raw files alone."""
