"""The tests: unit/ mirrors the rooms, kits/ holds what tests share."""
