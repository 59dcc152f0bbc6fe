"""What is learned: data sets, losses and scores."""
