"""Keyword biasing.

keywords ──► lists: CTC labels of each, and the phrases (tokens) by which each can be written   once per list
               │
encode ────► spotter: scores and spans of the best ──► matches ──► draft, repaired              once per utterance
                                                          └──────► automaton of those heard, with higher boosts
                                                                   where the draft has them
"""
