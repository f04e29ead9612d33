"""Texts that are equal, or nearly: keys of each text, pairs with equal keys, groups of pairs.

The work is cut into functions that read and write files, which may run anywhere and in any order:

1. `write_keys` for each part of a corpus, with what `keys_of` gives for each of its texts;
2. `find_pairs` for each range that `plan` returns;
3. `resolve` once, over all pairs;
4. `Duplicates` in each part, to leave out all but the first text of each group.
"""
