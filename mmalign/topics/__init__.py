"""Topic overwriting: preference pairs that a model makes of its own answers, topic by topic.

"Topic-level Preference Overwriting" (TPO; later Rewriting, TPR), arXiv 2411.17265. Answers are
split into facts, facts of different answers that are about the same topic are grouped, and in one
answer wrong facts are replaced by right ones (chosen) and right ones by wrong ones (rejected), so
that the two sides differ in what they claim and not in style or length.

`types` holds the jobs as protocols, `prompts` and `roles` do them with language models, `facts`,
`similarity`, `cluster`, `select` and `rewriting` are the mathematics, `stages` and `runner` make
them resumable. The exact rules of Shapes world are `mmalign.shapes.topics`.
"""
