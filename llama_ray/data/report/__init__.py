"""What is in a dataset, for people: statistics and a page of HTML with pictures."""
