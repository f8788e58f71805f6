"""Trees of drafts for speculative verification: which candidates to verify, and where to ask for the next ones."""
