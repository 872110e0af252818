"""Building CNLE and CSNE from their sources (paper section III-C): stages with an inspectable artefact after each.

``collect -> score -> select -> split -> neighbours -> rephrase -> write``; :mod:`.pipeline` has both data sets' stages.
"""
