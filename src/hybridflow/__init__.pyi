from hybridflow.batch import Batch as Batch
from hybridflow.config.kinds.rl import RlConfig as RlConfig
from hybridflow.config.load import load_config as load_config
from hybridflow.errors import UserError as UserError
from hybridflow.face.train import train as train
from hybridflow.protocols.environments import Action as Action
from hybridflow.protocols.environments import Environment as Environment
from hybridflow.protocols.environments import Observation as Observation
from hybridflow.protocols.environments import ToolResult as ToolResult
from hybridflow.protocols.environments import tool as tool
from hybridflow.protocols.generation import Request as Request
from hybridflow.protocols.generation import Sampling as Sampling
from hybridflow.protocols.groups import Group as Group
from hybridflow.protocols.training import Loss as Loss
from hybridflow.trainers.rl.loop import estimate as estimate
from hybridflow.trainers.rl.loop import next_groups as next_groups
from hybridflow.trainers.rl.loop import publish_weights as publish_weights
from hybridflow.trainers.rl.loop import record as record
from hybridflow.trainers.rl.loop import update as update
from hybridflow.trainers.rl.run import open_run as open_run

__version__: str
