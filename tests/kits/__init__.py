"""What several tests share: images, processes, toy runs, the documents."""
