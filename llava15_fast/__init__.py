from .registration import register
register()
from .modeling import *
