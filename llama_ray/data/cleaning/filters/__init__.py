"""The filters that people know by name, each with the rules and limits of datatrove 0.10."""
