def fits(group, penalty, entry): return False
