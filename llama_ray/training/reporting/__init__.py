"""What a run tells of itself: events, metrics, skipped steps, profiles."""
