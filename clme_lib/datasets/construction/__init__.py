"""Building CNLE and CSNE from their sources (paper section III-C), stage by stage, each with its own file to inspect."""
