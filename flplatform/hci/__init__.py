"""The console framework: commands, sessions, the admin server and the shell.

It knows nothing of federated learning: it speaks of commands, targets and users. What a server
needs is exported here; the console's own modules (`shell`, `render`, `completion`) are imported
by their path, because only they need a terminal library.
"""

from flplatform.hci.admin_server import AdminServer, AuditTrail, Authorizer
from flplatform.hci.connection import Connection, ExitCode, Item, error_item
from flplatform.hci.grammar import did_you_mean, parse, parse_words, tokenise
from flplatform.hci.operations import Operation, Operations
from flplatform.hci.register import CommandRegister
from flplatform.hci.sessions import AdminSession, LoginThrottle, Sessions, login_refused
from flplatform.hci.spec import SESSION_RIGHT, CommandModule, CommandSpec, NoArguments, argument
from flplatform.hci.view import Parameter, SpecView, help_page, usage, view_of

__all__ = [
    "SESSION_RIGHT",
    "AdminServer",
    "AdminSession",
    "AuditTrail",
    "Authorizer",
    "CommandModule",
    "CommandRegister",
    "CommandSpec",
    "Connection",
    "ExitCode",
    "Item",
    "LoginThrottle",
    "NoArguments",
    "Operation",
    "Operations",
    "Parameter",
    "Sessions",
    "SpecView",
    "argument",
    "did_you_mean",
    "error_item",
    "help_page",
    "login_refused",
    "parse",
    "parse_words",
    "tokenise",
    "usage",
    "view_of",
]
