"""The exactness matrix: every trainer, stage, rank count, resume and launcher against one truth."""
