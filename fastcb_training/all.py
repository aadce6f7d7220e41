"All callbacks; import it after fastai's own star imports, which bear the same names"
from .shortepoch import *
from .resume import *
from .accumulation import *
from .clip import *
from .microbatch import *
from .bnfreeze import *
from .features import *
