"""What is refused: for each argument of each public name, the values that raise, by what they raise

Each raises when the object is made or the function called. The rows of `events` are keywords. Where a number is wanted, so
are NumPy's and `Fraction`s, but no `Decimal`, no bool and no array; where it is an amount, also a tensor that holds one number.
"""
from decimal import Decimal
from fractions import Fraction
from math import inf, nan

from numpy import array, bool_, float32, int64
from torch import nn, tensor

no_bools = {TypeError: [None, 1, 'yes', [True], bool_(True), tensor(True)]}
no_modules = {TypeError: [None, 3, 'model', [nn.ReLU()], nn.Linear, len]}

no_numbers = [None, True, bool_(True), '0.5', [.5], 1j, Decimal('0.5'), array(.5), tensor([.5]), float]
no_counts = [True, bool_(True), '2', [2], 2., nan, Fraction(2), array(2), tensor(2), int]
not_above_0 = [0, -.1, nan, -inf, int64(0), float32(nan), Fraction(-1, 2)]

refusals = {
    'ShortEpochCallback': {
        'pct': {ValueError: [*not_above_0, 1.0001, 2, inf, int64(2), Fraction(3, 2)], TypeError: no_numbers},
        'short_valid': no_bools,
        'n_batches': {ValueError: [0, -1, int64(0)], TypeError: no_counts},
        'n_valid': {ValueError: [0, -1, int64(0)], TypeError: no_counts},
        'resume': no_bools, 'overfit': no_bools, 'dry_run': no_bools},
    'ResumeFit': {
        'fname': {ValueError: ['', '.'], TypeError: [None, True, 0, 3, nan, inf, b'resume', [], ['resume'], {}]},
        'every': {ValueError: [-1, -.1, nan, -inf, int64(-1), float32(nan), Fraction(-1, 2)], TypeError: no_numbers},
        'minutes': {ValueError: not_above_0, TypeError: no_numbers[1:]}},
    'GradientAccumulation': {
        'n_acc': {ValueError: [*not_above_0, inf],
                  TypeError: [None, True, False, '', '32', b'1', [], [32], {}, 1j, Decimal(32), array([32]), tensor([16, 32])]},
        'count': {TypeError: [None, True, 0, 3, nan, inf, '', 'len', [], [len], {}]},
        'flush': no_bools,
        'reduction': {ValueError: ['', 'none', 'Mean', 'sums'], TypeError: [True, 0, 1, nan, b'sum', [], ['sum'], len]}},
    'GradientClip': {
        'max_norm': {ValueError: not_above_0, TypeError: no_numbers},
        'norm_type': {ValueError: not_above_0, TypeError: no_numbers},
        'nonfinite': {ValueError: ['', ' ', 'Skip', 'skip ', 'warn', 'none', 'nan'],
                      TypeError: [None, True, False, 0, 1, nan, inf, b'skip', [], ['skip'], ('skip', 'raise')]}},
    'MicroBatch': {
        'size': {ValueError: [0, -1, int64(0)], TypeError: no_counts}},
    'BnFreeze': {
        'only_frozen': no_bools,
        'all_layers': no_bools,
        'part': {TypeError: [True, 0, 3, nan, '', 'body', [], [len], {}], ValueError: [nn.ReLU()]},
        'events': {TypeError: [dict(before_fti=len), dict(fit=len), dict(after_lunch=None), dict(order=len), dict(learn=len),
                               *(dict(before_fit=o) for o in (None, True, 0, 3, nan, inf, '', 'len', [], [len], {}))]}},
    'FeatureCache': {
        'body': {TypeError: [True, 0, 3, nan, inf, '', 'model', [], [nn.ReLU()], {}]},
        'views': {ValueError: [0, -1, int64(0)], TypeError: [None, *no_counts]},
        'path': {TypeError: [True, 0, 3, nan, inf, b'kept', [], ['kept'], {}]}},
    'set_bn_eval': {
        'm': no_modules,
        'use_eval': no_bools,
        'only_frozen': no_bools},
    'frozen_bn': {
        'm': no_modules},
    'digits': {
        'path': {TypeError: [True, 0, 3, nan, inf, b'digits', [], ['digits'], {}]},
        'classes': {ValueError: [[], (), {}, range(0), [10], [-1], [0, 99], range(11), [int64(10)]],
                    TypeError: [None, True, 3, nan, inf, 'all', '12', ['1'], [1.], [nan], [inf], [True], [None], [[1]], [tensor(1)]]},
        'size': {ValueError: [0, -1, int64(0)], TypeError: [None, *no_counts]}},
}
