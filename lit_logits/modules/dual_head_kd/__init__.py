"""Parts of `DualHeadKD`: the two-headed student, its classifiers and the teacher."""
