"""Conversations for tuning: read from records, encoded with the tokens to learn marked, packed into rows."""
