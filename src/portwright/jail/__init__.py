from portwright.jail.launch import start
from portwright.jail.process import Jailed
from portwright.jail.spec import File, Jail

__all__ = ["File", "Jail", "Jailed", "start"]
