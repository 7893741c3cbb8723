from flplatform.admin.servicer import ADMIN_RULES
from flplatform.rpc.streams import DOWNLOAD, UPLOAD
from flplatform.rpc.v1 import federated_pb2 as pb


def test_every_method_of_the_port_declares_what_it_demands():
    service = pb.DESCRIPTOR.services_by_name["AdminConsole"]
    methods = {f"/{service.full_name}/{method.name}" for method in service.methods}
    assert set(ADMIN_RULES) == methods | {UPLOAD, DOWNLOAD}


def test_only_signing_in_needs_no_session():
    free = {method.rpartition("/")[2] for method, rule in ADMIN_RULES.items() if not rule.token}
    assert free == {"Challenge", "Login"}
