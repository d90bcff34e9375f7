def check(config):
    return [], []
