"""The segment table: one int64 row per parameter, and the float64 rows of scalars that belong to it.

A segment is one parameter's dense elements in memory order. A row holds *all* columns that any feature needs, so
that no feature changes its shape; columns without a use yet are zero. Gradient addresses change every step and
stand apart, in one int64 per segment. Every number a kernel needs at run time is read from these tables, so that
none is a kernel argument (Triton specialises integer arguments) and none is compiled in.
"""

import triton.language as tl

# Columns of a segment row (int64).
PARAM = tl.constexpr(0)  # address of the parameter's first element
NUMEL = tl.constexpr(1)  # stored real numbers in the segment (a complex element counts two)
GROUP = tl.constexpr(2)  # row of the hyper-parameter table
FLAGS = tl.constexpr(3)  # bits below
STEP = tl.constexpr(4)  # address of the step count (0-dim fp32 or fp64)
RESIDUAL = tl.constexpr(5)  # address of what a low-precision weight format keeps beside the weight
EMA = tl.constexpr(6)  # address of the weight average (fp32, or fp64 beside fp64 weights)
MASK = tl.constexpr(7)  # address of the update mask
WEIGHT_KEY = tl.constexpr(8)  # key of the random stream that rounds the weight
ROW_LENGTH = tl.constexpr(9)  # elements in one local row (trailing dims flattened)
GLOBAL_STRIDE = tl.constexpr(10)  # elements between two local rows in the global tensor
GLOBAL_OFFSET = tl.constexpr(11)  # global index of the first local element
NORM_START = tl.constexpr(12)  # first partial of this segment's gradient norm
NORM_COUNT = tl.constexpr(13)  # number of those partials
MEASURE_START = tl.constexpr(14)  # first partial of this segment's rule norms (two-pass rules)
MEASURE_COUNT = tl.constexpr(15)  # number of those partials
INDEX = tl.constexpr(16)  # address of the touched rows of a sparse gradient
EMA_STEP = tl.constexpr(17)  # count of averaged steps: address shifted left once | is fp64
CHANGE = tl.constexpr(18)  # address of (sum of squares of the weights, of their change), a pair per chunk
WHOLE_NUMEL = tl.constexpr(19)  # stored real numbers of the parameter over all ranks
SLOTS = tl.constexpr(20)  # then per state slot: address of the values, address of the scales
MAX_SLOTS = 8
ROW_WIDTH = tl.constexpr(44)
LAST = tl.constexpr(35)  # scalar slots fill the slots' columns from here down: address shifted left once | is fp64
KEYS = tl.constexpr(36)  # then per state slot: key of the random stream that rounds it

# Bits of FLAGS.
ALIGNED = tl.constexpr(1)  # every address of the row is a multiple of 16
MAXIMIZE = tl.constexpr(2)  # ascend instead of descend
DECOUPLED = tl.constexpr(4)  # weight decay acts on the parameter, else on the gradient
OWN_DECAY = tl.constexpr(8)  # the rule applies weight decay itself
STEP_IS_FP64 = tl.constexpr(16)  # the step count is fp64 (made under a float64 default dtype)
CLIP_ALONE = tl.constexpr(32)  # the norm that is clipped is the parameter's own, not that of all
COUNTED = tl.constexpr(128)  # another part of the step counts steps
LR_INDEPENDENT = tl.constexpr(64)  # decoupled decay follows lr/lr_initial instead of lr

# Columns of a hyper-parameter row (float64): values, and beside them addresses of tensors that override them.
LR = tl.constexpr(0)
WEIGHT_DECAY = tl.constexpr(1)
CLIP_NORM = tl.constexpr(2)  # largest norm of the gradient, or inf
CLIP_VALUE = tl.constexpr(3)  # largest magnitude of its elements, or inf
L1 = tl.constexpr(4)  # coupled L1 penalty
LR_INITIAL = tl.constexpr(5)  # the lr that `LR_INDEPENDENT` decay refers to
EMA_DECAY = tl.constexpr(6)  # of the weight average
EMA_WARMUP = tl.constexpr(7)  # not 0: it starts smaller
RULE_HYPERS = tl.constexpr(8)  # the rule's own, in the order it declares them
HYPER_WIDTH = tl.constexpr(24)
# Address columns hold the address shifted left once; the low bit says that the tensor is fp64, not fp32.

# Row 0 of the hyper-parameters holds what the groups agree on; the groups follow.
SKIP_NONFINITE = tl.constexpr(0)  # not 0: skip the step when a gradient is not finite
SKIP_ABOVE = tl.constexpr(1)  # skip it when the norm is above this, or inf

# Columns of the conditions (float64, and addresses as above): what one step is given. A captured step keeps its own.
GRAD_SCALE = tl.constexpr(0)  # what the loss was multiplied by
FOUND_INF = tl.constexpr(1)  # not 0: skip the step
CHECK = tl.constexpr(2)  # not 0: skip it when a gradient is not finite, whatever the groups say
TOTAL_SQUARE = tl.constexpr(3)  # given totals: sum (of squares; largest) over all gradients, as scaled
TOTAL_BAD = tl.constexpr(4)  # and whether an element is inf or NaN
TOTAL_NORM = tl.constexpr(5)  # given norm of all gradients, unscaled
TALLY = tl.constexpr(6)  # only an address: of running counts, below; 0 for all tables but one
CONDITIONS_WIDTH = tl.constexpr(8)

# Running counts (float64).
STEPS = tl.constexpr(0)  # steps, skipped ones too
CLIPPED = tl.constexpr(1)  # steps that clipped a gradient
SKIPPED_STEPS = tl.constexpr(2)
NONFINITE_STEPS = tl.constexpr(3)  # steps whose gradients held inf or NaN
TALLY_WIDTH = tl.constexpr(4)

# Columns of a scalar row (float64), written by the scalars kernel and read by the update kernel.
COEFFICIENT = tl.constexpr(0)  # what every gradient element is multiplied by (unscale × clip)
L2 = tl.constexpr(1)  # coupled weight decay
DECAY = tl.constexpr(2)  # decoupled weight decay, already multiplied by lr
SKIP = tl.constexpr(3)  # 1.0: this step changes nothing
SQUARE = tl.constexpr(4)  # sum of squares of the gradient, where it takes several partials
L1_PENALTY = tl.constexpr(5)  # coupled L1 penalty
LIMIT = tl.constexpr(6)  # largest magnitude of a gradient element
CLIP = tl.constexpr(7)  # what norm clipping alone multiplies with
EMA_WEIGHT = tl.constexpr(8)  # weight of the new value in the weight average, for `numerics.average`
GRADIENT_NORM = tl.constexpr(9)  # norm of this gradient alone, unscaled, where norms of single gradients are used
COUNT = tl.constexpr(10)  # step count after this step, which random streams go by
RULE_SCALARS = tl.constexpr(12)  # the rule's own, in the order it returns them
SCALAR_WIDTH = tl.constexpr(32)

# Header (float64): results of a step that belong to no segment.
NORM = tl.constexpr(0)  # gradient norm before clipping, rounded to fp32 (fp64 when a gradient is fp64)
NONFINITE = tl.constexpr(1)  # 1.0 when a gradient holds inf or NaN
SKIPPED = tl.constexpr(2)  # 1.0 when the step was skipped
NORM_IS_FP64 = tl.constexpr(3)  # in: 1.0: keep the norm in fp64
OWN_SQUARE = tl.constexpr(4)  # sum (of squares; largest) over this table's gradients alone, as scaled
OWN_BAD = tl.constexpr(5)  # whether one of these is inf or NaN
FOUND = tl.constexpr(6)  # NONFINITE once more, as fp32 in the first four bytes: what a GradScaler reads
HEADER_WIDTH = tl.constexpr(8)

# How a format rounds: fourth entry of a codec.
NEAREST = tl.constexpr(0)
STOCHASTIC = tl.constexpr(1)  # up or down by random bits
DITHERED = tl.constexpr(2)  # up or down by a sequence that covers the unit evenly, over elements and over steps

# Where the norm of a step comes from: `NORM_MODE` of the scalars kernel.
NO_NORM = tl.constexpr(0)  # none is wanted; gradients may still be scaled
OWN_NORM = tl.constexpr(1)  # this table's partials
SUMMED_NORM = tl.constexpr(2)  # sums of several tables, among the conditions
GIVEN_NORM = tl.constexpr(3)  # the caller's, among the conditions

# What is summed up for a norm: `KIND` of norm kernels.
NORM_ONE = tl.constexpr(1)  # magnitudes
NORM_TWO = tl.constexpr(2)  # squares
NORM_INF = tl.constexpr(3)  # the largest magnitude, no sum

# Counts (int64) read by kernels at run time.
N_SEGMENTS = tl.constexpr(0)
N_MULTI = tl.constexpr(1)  # segments with more than one norm partial; their indices follow from MULTI on
MULTI = tl.constexpr(2)

SCALE_GROUP = 64  # elements that share a scale; part of the formats' definition
CHUNK = 16384  # elements per program of the update kernel; a multiple of every codec's group and of 8
NORM_CHUNK = 16384  # part of the norm's definition: never tuned
NORM_BLOCK = 2048  # likewise
LANES = 1024  # likewise: lane of a partial = its index within the parameter mod LANES
