"""Token reduction: where fewer tokens are legal, the rewriting that they oblige to, and padding taken out."""
