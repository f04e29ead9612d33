"""Small pure functions that several floors need."""
