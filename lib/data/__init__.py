"""What goes in: download, file formats, labels, count files, mini-batches, embeddings."""
