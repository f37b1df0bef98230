import pytest
from browsing import Visitor, needs_chromium, new_browser, new_root  # noqa: F401
from app_server import AppServer
@pytest.fixture(scope="module")
def server(tmp_path_factory, root):
    with AppServer(tmp_path_factory.mktemp("app") / "jobs", "--root", str(root)) as found:
        yield found
def test_jobs(server, browser):
    v = Visitor(browser, server.url).arrive("?model=folder:tiny&recipe=kmeans")
    v.page.set_default_timeout(30000)
    for bits in (0, 1, 0):
        v.page.locator("#bits label").nth(bits).click()
        v.page.wait_for_timeout(1500)
        v.press("#start")
        v.see("#progress .done", f"tiny-{bits+2}bit · kmeans · seed 0 is packed")
        v.page.wait_for_timeout(1500)
        print(bits, v.text("#drawn"), v.text("#figures")[:80])
        if "packed" in v.text("#drawn"):
            v.press("#draw")
            v.see("#figures", "noise error")
    v.open("#jobs-box")
    v.page.wait_for_timeout(1000)
    v.shoot("jobs", "#run"); v.shoot("jobs-compare", "#compare")
    print(v.text("#jobs-box"))
    v.page.locator("#jobs label").nth(1).click()
    v.press("#jobs-show")
    v.page.wait_for_timeout(2500)
    print(v.text("#progress"), v.text("#command"), v.text("#drawn"), v.text("#figures")[:60])
    v.page.once("dialog", lambda d: d.accept())
    v.press("#jobs-delete")
    v.page.wait_for_timeout(2500)
    print(v.text("#jobs-box"), v.text("#progress"), v.text("#drawn"), v.errors)
    v.page.once("dialog", lambda d: d.accept())
    v.press("#jobs-delete")
    v.page.wait_for_timeout(2500)
    print(v.text("#jobs-box"), v.text("#progress"), v.text("#drawn"), v.errors)
