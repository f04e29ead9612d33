"""Small pure functions that several packages need."""
