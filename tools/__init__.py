"""What only a checkout needs: training of the shipped estimators and extractors, the measures of
the house.
"""
