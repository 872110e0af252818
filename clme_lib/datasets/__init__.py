"""Datasets (CNLE and CSNE): cases, their sources and their construction."""
