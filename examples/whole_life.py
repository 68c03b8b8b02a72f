#!/usr/bin/env python3
"""The whole life of a sale, told over HTTP.

An operator makes a sale with two rounds; a crowd buys and pays, or does not; what is not paid goes to
those who wait in line; money and units go back; a cart is bought; the next round opens. Every answer
is checked: the exit code is 0 if all of it was as promised, 1 if the server cannot be used, 2 if a
promise was broken. It takes some 20 seconds, needs nothing but Python 3.9, and leaves the server running.

    make run                          # in another terminal
    python3 examples/whole_life.py

Operators are whom the server knows: with --password (or STOCKADE_OPERATOR_PASSWORD) the script logs
in as --email. Without, it signs a token itself, with the secret of an embedded server on this machine
(STOCKADE_JWT_SECRET, or jwt_secret in --data-dir), as any identity provider that shares it could.
"""

import argparse
import base64
import csv
import hashlib
import hmac
import io
import json
import os
import pathlib
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone

# Units of the first round, and how long an order waits for its payment.
UNITS = 6
HOLD_SECONDS = 8
# How long anything may take that does not happen at once.
PATIENCE = 30


class Broken(Exception):
    """The server did not do what it promises."""


# --- How to talk to it ------------------------------------------------------------------------------


class Answer:
    def __init__(self, request, status, headers, body):
        self.request, self.status, self.headers, self.body = request, status, headers, body

    @property
    def json(self):
        return json.loads(self.body)

    def expect(self, status, code=None):
        """This answer, if it is the one that was promised."""
        told = self.json.get("code") if self.status >= 400 and self.body else None
        if self.status != status or (code and told != code):
            wanted = f"{status} {code or ''}".strip()
            raise Broken(f"{self.request} gave {self.status} {self.body.decode()[:400]}, not {wanted}")
        return self


class Server:
    def __init__(self, url):
        self.url = url.rstrip("/")

    def call(self, method, path, body=None, token=None, key=None, headers=None):
        """One request. `key` is the Idempotency-Key: whoever gets no answer sends the same again."""
        headers = dict(headers or {})
        if token:
            headers["Authorization"] = f"Bearer {token}"
        if key:
            headers["Idempotency-Key"] = key
        if isinstance(body, (dict, list)):
            headers["Content-Type"] = "application/json"
            body = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        name = f"{method} {path}"
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return Answer(name, answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as refusal:
            return Answer(name, refusal.code, refusal.headers, refusal.read())


class User:
    """Somebody with a token."""

    def __init__(self, server, name, token):
        self.server, self.name, self.token = server, name, token

    def call(self, method, path, body=None, key=None, headers=None):
        return self.server.call(method, path, body, self.token, key, headers)

    def get(self, path):
        return self.call("GET", path).expect(200).json

    def post(self, path, body=None, key=None):
        return self.call("POST", path, body if body is not None else {}, key or new_key())

    def buy(self, sale, quantity=1, key=None):
        return self.post(f"/v1/sales/{sale}/orders", {"quantity": quantity}, key)

    def pay(self, order, method, key=None):
        return self.post(f"/v1/orders/{order['id']}/pay", {"payment_method": method}, key)

    def order(self, order):
        return self.get(f"/v1/orders/{order['id']}")


def new_key():
    return str(uuid.uuid4())


def until(what, look):
    """What a look finds, as soon as it finds something."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if seen := look():
            return seen
        time.sleep(0.1)
    raise Broken(f"after {PATIENCE} s still not: {what}")


def found(value, is_it):
    """The value if it is what is looked for."""
    return value if is_it(value) else None


def instant(offset_seconds):
    """A timestamp as the API wants it."""
    when = datetime.now(timezone.utc) + timedelta(seconds=offset_seconds)
    return when.strftime("%Y-%m-%dT%H:%M:%S.") + f"{when.microsecond // 1000:03d}Z"


# --- How to tell it ---------------------------------------------------------------------------------

began = time.monotonic()


def chapter(title):
    print(f"\n{time.monotonic() - began:5.1f} s  {title}", flush=True)


def say(text):
    print(f"         {text}", flush=True)


def check(kept, promise):
    if not kept:
        raise Broken(promise)
    say(f"✓ {promise}")


def units(view):
    return f"{view['remaining']} remain, {view['held']} held, {view['sold']} sold of {view['allocation']}"


# --- Who takes part ---------------------------------------------------------------------------------


def operator_of(server, args):
    if args.password:
        login = {"email": args.email, "password": args.password}
        token = server.call("POST", "/v1/auth/login", login).expect(200).json["access_token"]
        return User(server, "operator", token)
    secret = os.environ.get("STOCKADE_JWT_SECRET")
    file = pathlib.Path(args.data_dir) / "jwt_secret"
    if not secret:
        try:
            secret = file.read_text().strip()
        except OSError:
            sys.exit(f"no operator: give --password, or --data-dir of the server ({file} cannot be read)")
    now = int(time.time())
    claims = {
        "iss": "stockade", "aud": "stockade", "sub": str(uuid.uuid4()), "role": "operator",
        "iat": now, "exp": now + 600, "jti": str(uuid.uuid4()),
    }
    def text(data):
        return base64.urlsafe_b64encode(data).rstrip(b"=")
    signed = b".".join(text(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "at+jwt"}, claims))
    signature = hmac.new(secret.encode(), signed, hashlib.sha256).digest()
    return User(server, "operator", (signed + b"." + text(signature)).decode())


def register(server, name, run):
    account = {"email": f"{name.lower()}.{run}@example.org", "password": f"a password of {name} {run}"}
    server.call("POST", "/v1/auth/register", {**account, "name": name}).expect(201)
    token = server.call("POST", "/v1/auth/login", account).expect(200).json["access_token"]
    return User(server, name, token)


def picture(width=320, height=200):
    """A PNG: a sunset."""
    rows = bytearray()
    for y in range(height):
        rows.append(0)
        for x in range(width):
            rows += bytes((255 - y * 120 // height, 120 + x * 80 // width, 60 + y * 160 // height))
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(rows))) + chunk(b"IEND", b"")


# --- The story --------------------------------------------------------------------------------------


def play(server, operator, run):
    chapter("Eleven buyers register and log in")
    names = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivo", "Jun", "Kim"]
    with ThreadPoolExecutor(4) as pool:
        *crowd, kim = pool.map(lambda name: register(server, name, run), names)

    chapter("The operator makes two products, one with a picture, and a sale of each")
    price = {"amount": 14900, "currency": "EUR"}
    sneaker = {"name": f"Aurora Sneaker {run}", "description": "Numbered, in the colours of a polar night.", "price": price}
    product = operator.post("/v1/products", sneaker).expect(201).json["id"]
    headers = {"Content-Type": "image/png"}
    image = operator.call("POST", f"/v1/products/{product}/images", picture(), headers=headers).expect(201).json
    rendition = server.call("GET", image["renditions"][0]["url"]).expect(200)
    check(rendition.headers["Content-Type"].startswith("image/"), f"the picture is served in {len(image['renditions'])} sizes")
    ends, ends_later = instant(90), instant(100)
    sale = operator.post("/v1/sales", {
        "product_id": product,
        "allocation": UNITS,
        "per_buyer_limit": 2,
        "hold_seconds": HOLD_SECONDS,
        "payment": "sandbox",
        "waitlist": True,
        "schedule": {"windows": [
            {"opens_at": instant(3), "closes_at": ends},
            {"opens_at": instant(120), "closes_at": instant(180)},
        ]},
    }).expect(201).json
    drop = f"/v1/sales/{sale['id']}"
    say(f"the sale {sale['id']}: {UNITS} units a round, {HOLD_SECONDS} s to pay, at most two for each buyer")
    laces = {"name": f"Aurora Laces {run}", "description": "Two pairs.", "price": {"amount": 900, "currency": "EUR"}}
    product = operator.post("/v1/products", laces).expect(201).json["id"]
    standing = operator.post("/v1/sales", {"product_id": product, "allocation": 1, "per_buyer_limit": 5}).expect(201).json
    check(standing["state"] == "open", "a sale without a window is open at once")
    early = kim.buy(sale["id"]).expect(409, "not_open").json
    check(early["starts_in_ms"] > 0, f"nobody buys before the start: it opens in {early['starts_in_ms']} ms")

    chapter(f"It opens: ten want one of {UNITS}, at the same instant, every one of them twice")
    until("the sale is open", lambda: operator.get(drop)["state"] == "open")
    gate = threading.Barrier(len(crowd))
    def rush(buyer):
        key = new_key()
        gate.wait()
        return buyer, key, buyer.buy(sale["id"], key=key), buyer.buy(sale["id"], key=key)
    with ThreadPoolExecutor(len(crowd)) as pool:
        rushed = list(pool.map(rush, crowd))
    for buyer, _, first, again in rushed:
        if first.status == 201:
            same = again.expect(201).body == first.body and again.headers["Idempotency-Replayed"] == "true"
            if not same:
                raise Broken(f"{buyer.name}'s retry is not the first answer")
        else:
            first.expect(409, "sold_out")
    winners = [(buyer, first.json) for buyer, _, first, _ in rushed if first.status == 201]
    losers = [buyer for buyer, _, first, _ in rushed if first.status != 201]
    check(len(winners) == UNITS, f"{UNITS} got one: {', '.join(buyer.name for buyer, _ in winners)}")
    check(all(order["status"] == "held" for _, order in winners), f"held until {winners[0][1]['held_until']}")
    check(True, "a retry with the same key is the same 201, byte for byte")
    buyer, order = winners[0]
    first_key = next(key for who, key, _, _ in rushed if who is buyer)
    first_body = next(first.body for who, _, first, _ in rushed if who is buyer)
    buyer.buy(sale["id"], 3).expect(422, "order_limit")
    limit = buyer.buy(sale["id"], 2).expect(409, "buyer_limit").json
    check(limit["limit"] == 2 and limit["held"] == 1, f"{buyer.name} cannot have three")

    chapter("Those who came too late wait in line")
    line = []
    for place, loser in enumerate(losers, 1):
        key = new_key()
        joined = loser.call("POST", f"{drop}/waitlist", {"quantity": 1}, key).expect(200).json
        if joined["position"] != place:
            raise Broken(f"{loser.name} has place {joined['position']}, not {place}")
        line.append((loser, key))
        say(f"{loser.name}: place {place}, {joined['held']} units are held before them, odds {joined['odds']}")

    chapter("They pay, each in another way")
    (prompt, prompt_order), (declined, declined_order), (noisy, noisy_order), (slow, slow_order), *never = winners
    extended = slow.post(f"/v1/orders/{slow_order['id']}/extend").expect(200).json
    check(extended["held_until"] > slow_order["held_until"], f"{slow.name} is about to pay, and gets more time, once")
    paid = prompt.pay(prompt_order, "sandbox_ok").expect(200).json
    check(paid["status"] == "confirmed", f"{prompt.name} pays: confirmed, {paid['payment']['amount']['amount']} taken")
    no = declined.pay(declined_order, "sandbox_insufficient_funds").expect(402, "payment_declined").json
    check(declined.order(declined_order)["status"] == "held", f"{declined.name}'s bank says no ({no['decline']}): the order is still held")
    check(declined.pay(declined_order, "sandbox_ok").expect(200).json["status"] == "confirmed", "… and another card pays for it")
    paid = noisy.pay(noisy_order, "sandbox_noisy").expect(200).json
    check(paid["status"] == "confirmed", f"{noisy.name} pays; the bank's webhooks will come late, three times each")
    key = new_key()
    waits = slow.pay(slow_order, "sandbox_pending", key)
    if waits.status == 202:
        say(f"{slow.name}'s bank thinks (202); the same request again says what came of it")
    thought = until("the bank decides", lambda: found(
        slow.pay(slow_order, "sandbox_pending", key), lambda answer: answer.status != 202))
    check(thought.expect(200).json["status"] == "confirmed", f"{slow.name}'s bank says yes")

    chapter(f"{' and '.join(buyer.name for buyer, _ in never)} never pay: their units go to the line")
    for loser, key in line[: len(never)]:
        offered = offer(drop, loser, key)
        paid = loser.pay(offered, "sandbox_ok").expect(200).json
        check(paid["status"] == "confirmed", f"{loser.name} was next, got a hold and paid")
    for buyer, order in never:
        buyer.pay(order, "sandbox_ok").expect(409, "hold_expired")
        check(buyer.order(order)["status"] == "expired", f"{buyer.name} comes too late: hold_expired, nothing is taken")
    webhooks = noisy.order(noisy_order)["payment"]
    check(webhooks["captured"] == price["amount"] and webhooks["refunded"] == 0, f"{noisy.name}'s late webhooks have changed nothing: taken once")
    view = operator.get(drop)
    check(view["sold"] == UNITS and view["held"] == 0, f"exactly the allocation is sold: {units(view)}")

    chapter("The operator changes things while it runs")
    leaver, waiter = line[-1], line[-2]
    leaver[0].call("DELETE", f"{drop}/waitlist").expect(204)
    key = new_key()
    view = operator.post(f"{drop}/restock", {"units": 4}, key).expect(200).json
    again = operator.post(f"{drop}/restock", {"units": 4}, key).expect(200)
    check(again.headers["Idempotency-Replayed"] == "true" and again.json["allocation"] == UNITS + 4, "four more, and a retry adds none")
    offered = offer(drop, *waiter)
    check(waiter[0].pay(offered, "sandbox_ok").expect(200).json["status"] == "confirmed",
          f"the first of them is {waiter[0].name}'s, who waits; {leaver[0].name} has left the line")
    operator.post(f"{drop}/pause").expect(200)
    kim.buy(sale["id"]).expect(409, "paused")
    check(operator.post(f"{drop}/resume").expect(200).json["state"] == "open", "paused: nobody buys; resumed: open")
    operator.post(f"{drop}/reduce", {"units": 100}).expect(409, "insufficient")
    view = operator.post(f"{drop}/reduce", {"units": 1}).expect(200).json
    check(view["allocation"] == UNITS + 3, f"only what remains can be taken out: {units(view)}")
    operator.post(f"{drop}/extend", {"closes_at": ends_later}).expect(200)
    check(operator.get(drop)["closes_at"] == ends_later, f"the round ends at {ends_later} instead of {ends}")

    chapter("Money and units go back")
    pair = kim.buy(sale["id"], 2).expect(201).json
    kim.pay(pair, "sandbox_ok").expect(200)
    operator.post(f"/v1/orders/{pair['id']}/refund", {"quantity": 1, "reason": "one did not fit"}).expect(200)
    part = refunded(kim, pair)
    check(part["status"] == "confirmed" and part["returned"] == 1 and part["payment"]["refunded"] == price["amount"], f"{kim.name} gives one of two back, and keeps the other")
    operator.post(f"/v1/orders/{prompt_order['id']}/refund").expect(200)
    whole = refunded(prompt, prompt_order)
    check(whole["status"] == "refunded" and whole["payment"]["refunded"] == price["amount"], f"{prompt.name} gets everything back")
    declined.post(f"/v1/orders/{declined_order['id']}/cancel").expect(200)
    whole = refunded(declined, declined_order)
    check(whole["status"] == "cancelled" and whole["payment"]["refunded"] == price["amount"], f"{declined.name} cancels, and gets everything back")
    say(f"on sale again: {units(operator.get(drop))}")

    chapter("A cart with both sales: all of it, or nothing")
    def fill(laces):
        lines = [{"sale_id": sale["id"], "quantity": 1}, {"sale_id": standing["id"], "quantity": laces}]
        return leaver[0].call("PUT", "/v1/cart", {"lines": lines}).expect(200).json
    before = operator.get(drop)
    fill(2)
    failed = leaver[0].post("/v1/cart/checkout").expect(409, "checkout_failed").json
    for reason in failed["lines"]:
        say(f"{reason['quantity']} of {reason['sale_id']}: {reason['code']}")
    codes = [reason["code"] for reason in failed["lines"]]
    after = operator.get(drop)
    check(codes == ["left_out", "insufficient"] and after["remaining"] == before["remaining"], "one line cannot be had: nothing is held")
    fill(1)
    key = new_key()
    bought = leaver[0].post("/v1/cart/checkout", key=key).expect(201)
    check([order["status"] for order in bought.json["orders"]] == ["held", "confirmed"], "both, at once; what costs money is held")
    check(leaver[0].post("/v1/cart/checkout", key=key).expect(201).body == bought.body, "a retry is the same 201")
    check(leaver[0].get("/v1/cart")["lines"] == [], "the cart is empty")
    paid = leaver[0].pay(bought.json["orders"][0], "sandbox_ok").expect(200).json
    check(paid["status"] == "confirmed", f"{leaver[0].name} pays for it")

    chapter("The round ends early, and the next one opens sooner")
    check(operator.post(f"{drop}/close").expect(200).json["state"] != "open", "the first round is closed")
    second = operator.call("GET", f"{drop}/rounds/2").expect(200)
    headers = {"If-Match": second.headers["ETag"]}
    operator.call("PATCH", f"{drop}/rounds/2", {"opens_at": instant(2)}, headers=headers).expect(200)
    view = until("the second round is open", lambda: found(
        operator.get(drop), lambda sale: sale["round"] == 2 and sale["state"] == "open"))
    check(view["remaining"] == UNITS, f"fresh units: {units(view)}")
    again = prompt.buy(sale["id"], key=first_key).expect(201)
    check(again.body == first_body and again.headers["Idempotency-Replayed"] == "true",
          f"{prompt.name}'s old key is {prompt.name}'s old order, of round {again.json['round']}")
    fresh = prompt.buy(sale["id"], 2).expect(201).json
    check(fresh["round"] == 2, f"with a new key {prompt.name} buys two: limits begin anew")
    check(prompt.pay(fresh, "sandbox_ok").expect(200).json["status"] == "confirmed", "… and pays")
    rounds = [(one["round"], one["state"]) for one in operator.get(f"{drop}/rounds")["data"]]
    check(rounds == [(1, "closed"), (2, "open")], f"its rounds: {rounds}")
    operator.post(f"{drop}/close").expect(200)
    operator.post(f"/v1/sales/{standing['id']}/close").expect(200)

    epilogue(operator, drop)


def offer(drop, buyer, key):
    """The order that a place in line has become: the same request with the same key finds it."""
    wait = {"quantity": 1}
    return until(f"{buyer.name} is offered a unit", lambda: found(
        buyer.call("POST", f"{drop}/waitlist", wait, key), lambda answer: answer.status == 201)).json


def refunded(buyer, order):
    """The order once all that is to be given back has been."""
    return until("the money is back", lambda: found(
        buyer.order(order), lambda order: order["payment"]["refund_due"] == 0))


def epilogue(operator, drop):
    chapter("What became of it")
    for number in (1, 2):
        audit = until("the audit has a verdict", lambda: found(
            operator.get(f"{drop}/audit?round={number}"), lambda audit: audit["verdict"] != "pending"))
        failing = [one for one in audit["checks"] if one["status"] != "pass"]
        if failing:
            raise Broken(f"the audit of round {number}: {failing}")
        check(audit["verdict"] == "pass", f"the audit of round {number} passes, with {len(audit['checks'])} checks")

    board = operator.get(f"{drop}/leaderboard?round=1&limit=100")["data"]
    say("leaderboard of round 1:")
    for place in board:
        say(f"  {place['rank']:2}. {place['buyer'][:12]}  {place['quantity']}  at {place['accepted_at']}")
    check([place["seq"] for place in board] == sorted(place["seq"] for place in board), "in order of purchase")

    export = operator.call("GET", f"{drop}/orders.csv").expect(200).body.decode()
    rows = list(csv.DictReader(io.StringIO(export)))
    say("orders.csv:")
    for row in rows:
        say("  " + "  ".join(row[name] for name in ("round", "seq", "quantity", "status", "returned_units", "total_minor", "currency")))
    on_board = [row for row in rows if row["round"] == "1" and row["status"] == "confirmed"]
    check(len(on_board) == len(board), f"{len(rows)} orders are exported; the confirmed ones are on the leaderboard")

    report = operator.get(f"{drop}/report?round=1")
    shown = {name: report[name] for name in ("units", "revenue", "orders", "sold_out", "holds")}
    shown["demand"] = {name: report["demand"][name] for name in ("requests", "accepted", "refused_by_reason", "unmet_units")}
    say("from the report on round 1:")
    for line in json.dumps(shown, indent=2).splitlines():
        say("  " + line)


def main():
    about, _, _ = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=about)
    env = os.environ.get
    parser.add_argument("--url", default=env("STOCKADE_URL", "http://127.0.0.1:8080"))
    parser.add_argument("--email", default=env("STOCKADE_OPERATOR_EMAIL", "operator@stockade.example"))
    parser.add_argument("--password", default=env("STOCKADE_OPERATOR_PASSWORD"))
    parser.add_argument("--data-dir", default=env("STOCKADE_DATA_DIR", ".stockade"))
    args = parser.parse_args()
    server = Server(args.url)
    try:
        server.call("GET", "/readyz").expect(200)
    except (OSError, Broken) as trouble:
        print(f"no server at {args.url}, or it is not ready: {trouble}", file=sys.stderr)
        return 1
    try:
        play(server, operator_of(server, args), new_key()[:8])
    except (Broken, KeyError, OSError, ValueError) as trouble:
        print(f"\nnot as promised: {type(trouble).__name__}: {trouble}", file=sys.stderr)
        return 2
    print(f"\n{time.monotonic() - began:5.1f} s  Everything was as promised.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
