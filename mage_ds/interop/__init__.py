"""Other people's files, through key tables: the authors' checkpoints, exports, published weights of losses."""
