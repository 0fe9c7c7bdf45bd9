"""fragments -> snapshot -> commit -> export: what is saved, where, and how it comes back at another size."""
