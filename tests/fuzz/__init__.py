"""Every reader of files that come from elsewhere, given harmed ones."""
