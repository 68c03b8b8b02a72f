//! Hurdles: what a sale may ask of whoever buys, and that nothing else gets around it.

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use stockade::{
    auth::{Role, token::Identity},
    clock,
    domain::{
        id::{BuyerId, SaleId},
        proof::{ProofKey, Purpose, Subject},
    },
};
use uuid::Uuid;

use super::{
    carts::{checkout, fill},
    selling::{ask, assert_replays, refused},
    support::app::{Answer, App, SECRET, crowd, id, send, sql},
};

const PROOF: &str = "Proof-Of-Work";

/// Bits that a test finds in no time.
const BITS: u64 = 8;

async fn challenge(app: &App, sale: &str, buyer: Uuid, purpose: &str, key: &str) -> Value {
    let path = format!("/v1/sales/{sale}/challenge");
    let request = ask(app, Method::POST, buyer, &path)
        .header("Idempotency-Key", key)
        .json(&json!({ "purpose": purpose }));
    send(request).await.expect(200).json()
}

/// What a client finds, from what the documents say and nothing else.
fn solve(challenge: &Value) -> String {
    let text = challenge["challenge"].as_str().unwrap();
    let bits = u32::try_from(challenge["bits"].as_u64().unwrap()).unwrap();
    let proofs = (0_u64..).map(|number| format!("{text}.{number}"));
    let mut solved = proofs.filter(|proof| {
        let hash = Sha256::digest(proof);
        u32::from_be_bytes(hash[..4].try_into().unwrap()).leading_zeros() >= bits
    });
    solved.next().unwrap()
}

async fn proof(app: &App, sale: &str, buyer: Uuid, purpose: &str, key: &str) -> String {
    solve(&challenge(app, sale, buyer, purpose, key).await)
}

async fn buy(app: &App, sale: &str, buyer: Uuid, key: &str, proof: &str) -> Answer {
    let body = json!({ "quantity": 1 }).to_string();
    let purchase = app.purchase(sale, buyer, key, body);
    send(purchase.header(PROOF, proof)).await
}

async fn change(app: &App, sale: &str, change: &Value) -> Answer {
    let path = format!("/v1/sales/{sale}");
    let etag = app.get(&path).await.header("etag").unwrap().to_owned();
    let request = app.operate(Method::PATCH, &path).header("If-Match", etag);
    send(request.json(change)).await
}

fn with_token(app: &App, token: &str, method: Method, path: &str, body: &Value) -> RequestBuilder {
    let request = app.request(method, path).bearer_auth(token);
    request.json(body)
}

fn invalid(answer: &Answer, reason: &str) {
    refused(answer, 403, "proof_invalid");
    let body = answer.json();
    assert_eq!(
        (&body["reason"], &body["retry"], &body["outcome"]),
        (&json!(reason), &json!("same_key"), &json!("not_applied")),
        "{body}"
    );
}

#[tokio::test]
async fn a_proof_is_good_for_one_key_of_one_buyer_in_one_sale() {
    let app = App::start().await;
    let terms = json!({ "proof_of_work_bits": BITS, "per_buyer_limit": 3 });
    let (sale, other) = (app.sale(terms.clone()).await, app.sale(terms).await);
    assert_eq!(sale["proof_of_work_bits"], BITS);
    assert_eq!(sale["min_account_age_seconds"], Value::Null);
    let (sale, other) = (id(&sale), id(&other));
    let (ada, eve) = (clock::new_id(), clock::new_id());

    let without = app.buy(sale, ada, "k", 1).await;
    refused(&without, 403, "proof_required");
    let told = without.json();
    assert_eq!(told["retry"], "same_key");
    assert_eq!(told["challenge"], format!("/v1/sales/{sale}/challenge"));
    assert_eq!(told["bits"], BITS);

    let given = challenge(&app, sale, ada, "order", "k").await;
    assert_eq!(given["bits"], BITS);
    let right = solve(&given);
    let text = given["challenge"].as_str().unwrap();
    let unsolved = (0_u64..).map(|number| format!("{text}.{number}"));
    let unsolved = unsolved.take(16).find(|proof| *proof != right).unwrap();
    invalid(&buy(&app, sale, ada, "k", &unsolved).await, "unsolved");
    invalid(&buy(&app, sale, ada, "k", text).await, "unreadable");
    invalid(&buy(&app, sale, ada, "k", "").await, "unreadable");
    // Of another key, another buyer, another sale, another purpose.
    invalid(&buy(&app, sale, ada, "l", &right).await, "foreign");
    invalid(&buy(&app, sale, eve, "k", &right).await, "foreign");
    invalid(&buy(&app, other, ada, "k", &right).await, "foreign");
    let line = proof(&app, sale, ada, "waitlist", "k").await;
    invalid(&buy(&app, sale, ada, "k", &line).await, "foreign");
    // Easier, or for longer, than it was given out.
    for forged in [
        right.replacen(&format!(".{BITS}."), ".1.", 1),
        right.replacen("v1.1", "v1.9", 1),
    ] {
        assert_ne!(forged, right);
        invalid(&buy(&app, sale, ada, "k", &forged).await, "foreign");
    }
    let stranger = ProofKey::new(b"another secret of 32 bytes and more").unwrap();
    let subject = Subject {
        sale: SaleId(sale.parse().unwrap()),
        buyer: BuyerId(ada),
        purpose: Purpose::Order,
        key: "k",
    };
    let of = |key: &ProofKey, bits: u64, at_ms: i64| {
        let (text, _) = key.challenge(&subject, u8::try_from(bits).unwrap(), at_ms);
        solve(&json!({ "challenge": text, "bits": bits }))
    };
    let now_ms = clock::now_ms();
    let forged = of(&stranger, BITS, now_ms);
    invalid(&buy(&app, sale, ada, "k", &forged).await, "foreign");
    let ours = ProofKey::new(SECRET.as_bytes()).unwrap();
    let easy = of(&ours, BITS - 1, now_ms);
    invalid(&buy(&app, sale, ada, "k", &easy).await, "too_easy");
    let expired = of(&ours, BITS, now_ms - 121_000);
    invalid(&buy(&app, sale, ada, "k", &expired).await, "expired");
    let body = json!({ "quantity": 1 }).to_string();
    let twice = app.purchase(sale, ada, "k", body);
    let twice = twice.header(PROOF, &right).header(PROOF, &right);
    refused(&send(twice).await, 400, "validation");
    assert_eq!(app.view(sale).await["seq"], 0);

    // The right one buys once, and everything that is sent with its key gets the same order: the
    // same proof, an old one, none.
    let first = buy(&app, sale, ada, "k", &right).await.expect(201);
    assert_replays(&buy(&app, sale, ada, "k", &right).await, &first);
    assert_replays(&buy(&app, sale, ada, "k", &expired).await, &first);
    assert_replays(&app.buy(sale, ada, "k", 1).await, &first);
    refused(
        &app.buy(sale, ada, "k", 2).await,
        422,
        "idempotency_key_mismatch",
    );
    invalid(&buy(&app, sale, ada, "l", &right).await, "foreign");
    assert_eq!(app.view(sale).await["seq"], 1);

    // More work from now on, and then none.
    let before = proof(&app, sale, ada, "order", "l").await;
    let harder = json!({ "proof_of_work_bits": BITS + 1 });
    let changed = change(&app, sale, &harder).await.expect(200).json();
    assert_eq!(changed["proof_of_work_bits"], BITS + 1);
    invalid(&buy(&app, sale, ada, "l", &before).await, "too_easy");
    let after = proof(&app, sale, ada, "order", "l").await;
    buy(&app, sale, ada, "l", &after).await.expect(201);
    for bad in [json!(0), json!(25)] {
        let answer = change(&app, sale, &json!({ "proof_of_work_bits": bad })).await;
        refused(&answer, 422, "validation");
    }
    let none = json!({ "proof_of_work_bits": null });
    let changed = change(&app, sale, &none).await.expect(200).json();
    assert_eq!(changed["proof_of_work_bits"], Value::Null);
    app.buy(sale, ada, "m", 1).await.expect(201);
    let nothing = challenge(&app, sale, ada, "order", "n").await;
    assert_eq!(nothing["bits"], 0);
    app.finish().await;
}

#[tokio::test]
async fn a_cart_and_a_place_in_line_need_proofs_of_their_own() {
    let app = App::start().await;
    let terms = json!({
        "proof_of_work_bits": BITS, "allocation": 1, "hold_seconds": 3_600, "waitlist": true,
    });
    let (lamp, chair) = (app.sale(terms.clone()).await, app.sale(terms).await);
    let free = app.sale(json!({})).await;
    let (ada, eve) = (clock::new_id(), clock::new_id());
    fill(&app, ada, &[(&lamp, 1), (&free, 1), (&chair, 1)]).await;
    let of_lamp = proof(&app, id(&lamp), ada, "checkout", "c").await;
    let of_chair = proof(&app, id(&chair), ada, "checkout", "c").await;
    let order = proof(&app, id(&chair), ada, "order", "c").await;

    let told = |answer: &Answer| -> Vec<(Value, Value)> {
        refused(answer, 409, "checkout_failed");
        let body = answer.json();
        assert_eq!(body["retry"], "same_key", "{body}");
        let lines = body["lines"].as_array().unwrap().iter();
        let told = lines.map(|line| (line["sale_id"].clone(), line["code"].clone()));
        told.collect()
    };
    let lamp_lacks = (lamp["id"].clone(), json!("proof_required"));
    let chair_lacks = (chair["id"].clone(), json!("proof_required"));
    let none = send(checkout(&app, ada, "c")).await;
    assert_eq!(told(&none), [lamp_lacks, chair_lacks]);
    let line = &none.json()["lines"][0];
    let path = format!("/v1/sales/{}/challenge", id(&lamp));
    assert_eq!(line["challenge"], path);
    let one = send(checkout(&app, ada, "c").header(PROOF, &of_lamp)).await;
    assert_eq!(told(&one), [(chair["id"].clone(), json!("proof_invalid"))]);
    let list = format!("{of_lamp},{order}");
    let another = send(checkout(&app, ada, "c").header(PROOF, list)).await;
    assert_eq!(
        told(&another),
        [(chair["id"].clone(), json!("proof_invalid"))]
    );
    for sale in [&lamp, &chair, &free] {
        assert_eq!(app.view(id(sale)).await["seq"], 0);
    }
    let both = format!("{of_chair}, {of_lamp}");
    let first = send(checkout(&app, ada, "c").header(PROOF, &both)).await;
    let first = first.expect(201);
    assert_replays(&send(checkout(&app, ada, "c")).await, &first);

    // Sold out: who waits in line needs a proof, and a key that it is for.
    let join = |key: &str| {
        let path = format!("/v1/sales/{}/waitlist", id(&lamp));
        let request = ask(&app, Method::POST, eve, &path).header("Idempotency-Key", key);
        request.json(&json!({ "quantity": 1 }))
    };
    refused(&send(join("w")).await, 403, "proof_required");
    let order = proof(&app, id(&lamp), eve, "order", "w").await;
    invalid(&send(join("w").header(PROOF, &order)).await, "foreign");
    let line = proof(&app, id(&lamp), eve, "waitlist", "w").await;
    invalid(&send(join("x").header(PROOF, &line)).await, "foreign");
    let place = send(join("w").header(PROOF, &line)).await.expect(200);
    assert_eq!(place.json()["position"], 1);
    // The place becomes an order, which a retry finds without any proof.
    let given_back = first.json()["orders"][0]["id"].as_str().unwrap().to_owned();
    super::selling::cancel(&app, ada, &given_back)
        .await
        .expect(200);
    let path = format!("/v1/sales/{}", id(&lamp));
    app.until(&path, |answer| answer.json()["held"] == 1).await;
    let order = send(join("w")).await.expect(201).json();
    assert_eq!(order["buyer_id"], eve.to_string());
    app.finish().await;
}

#[tokio::test]
async fn an_account_buys_once_it_is_old_enough_with_whatever_it_comes() {
    let app = App::start().await;
    let terms = json!({ "min_account_age_seconds": 3_600, "per_buyer_limit": 9, "allocation": 9 });
    let sale = app.sale(terms).await;
    assert_eq!(sale["min_account_age_seconds"], 3_600);
    let sale = id(&sale);
    let orders = format!("/v1/sales/{sale}/orders");
    let user = json!({ "email": "ada@example.org", "password": "correct horse battery staple", "name": "Ada" });
    let register = app.request(Method::POST, "/v1/auth/register").json(&user);
    let registered = send(register).await.expect(201).json();
    let login = json!({ "email": "ada@example.org", "password": "correct horse battery staple" });
    let login = async || {
        let request = app.request(Method::POST, "/v1/auth/login").json(&login);
        send(request).await.expect(200).json()
    };
    let text = |grant: &Value, name: &str| grant[name].as_str().unwrap().to_owned();
    let order = async |token: &str, key: &str| {
        let request = with_token(
            &app,
            token,
            Method::POST,
            &orders,
            &json!({ "quantity": 1 }),
        );
        send(request.header("Idempotency-Key", key)).await
    };
    let make_key = async |token: &str, name: &str| {
        let body = json!({ "name": name, "scopes": ["buy"] });
        let request = with_token(&app, token, Method::POST, "/v1/me/api-keys", &body);
        text(&send(request).await.expect(201).json(), "key")
    };

    let grant = login().await;
    let young_key = make_key(&text(&grant, "access_token"), "young").await;
    for token in [&text(&grant, "access_token"), &young_key] {
        let answer = order(token, "k").await;
        refused(&answer, 403, "account_too_young");
        let body = answer.json();
        assert_eq!(body["min_account_age_seconds"], 3_600);
        let at = |text: &Value| chrono::DateTime::parse_from_rfc3339(text.as_str().unwrap());
        let made = at(&registered["created_at"]).unwrap().timestamp();
        let old_enough = at(&body["old_enough_at"]).unwrap().timestamp_millis();
        assert_eq!(old_enough, (made + 3_600) * 1_000);
        assert_eq!(
            (&body["retry"], &body["outcome"]),
            (&json!("after"), &json!("not_applied"))
        );
        let wait: u64 = answer.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=3_600).contains(&wait), "{wait}");
    }
    // Whoever signs tokens elsewhere may say it or not.
    let signed = |age: Option<i64>| {
        let identity = Identity {
            user: clock::new_id(),
            role: Role::Buyer,
            session: None,
            registered_at: age.map(|age| clock::now().timestamp() - age),
        };
        let token = app.keys().mint(identity, clock::new_id(), clock::now());
        token.unwrap()
    };
    refused(
        &order(&signed(Some(3_500)), "k").await,
        403,
        "account_too_young",
    );
    let unknown = order(&signed(None), "k").await;
    refused(&unknown, 403, "account_too_young");
    assert_eq!(unknown.json()["retry"], "same_key");
    assert_eq!(unknown.json().get("old_enough_at"), None);
    let old = signed(Some(3_700));
    let first = order(&old, "k").await.expect(201);

    // A while later. A token says what was known when it was made.
    let mut sql = sql(&app).await;
    sqlx::query("UPDATE users SET created_at = created_at - interval '1 hour'")
        .execute(&mut sql)
        .await
        .unwrap();
    let refresh = json!({ "refresh_token": grant["refresh_token"] });
    let refresh = app.request(Method::POST, "/v1/auth/refresh").json(&refresh);
    let refreshed = send(refresh).await.expect(200).json();
    let again = login().await;
    let old_key = make_key(&text(&again, "access_token"), "old").await;
    for (n, token) in [
        text(&refreshed, "access_token"),
        text(&again, "access_token"),
        old_key,
    ]
    .iter()
    .enumerate()
    {
        order(token, &format!("{n}")).await.expect(201);
    }

    // More is asked from now on: what was accepted is told again, and nothing more is bought, in no
    // way.
    let older = json!({ "min_account_age_seconds": 31_536_000, "name": "For old friends" });
    change(&app, sale, &older).await.expect(200);
    assert_replays(&order(&old, "k").await, &first);
    refused(&order(&old, "l").await, 403, "account_too_young");
    let lines = json!({ "lines": [{ "sale_id": sale, "quantity": 1 }] });
    let put = with_token(&app, &old, Method::PUT, "/v1/cart", &lines);
    send(put).await.expect(200);
    let checkout = with_token(&app, &old, Method::POST, "/v1/cart/checkout", &json!({}));
    let failed = send(checkout.header("Idempotency-Key", "c")).await;
    refused(&failed, 409, "checkout_failed");
    assert_eq!(failed.json()["lines"][0]["code"], "account_too_young");
    let path = format!("/v1/sales/{sale}/waitlist");
    let join = with_token(&app, &old, Method::POST, &path, &json!({ "quantity": 1 }));
    refused(&send(join).await, 403, "account_too_young");
    let anybody = json!({ "min_account_age_seconds": null });
    change(&app, sale, &anybody).await.expect(200);
    order(&signed(None), "k").await.expect(201);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swarm_without_proofs_gets_nothing_and_costs_redis_no_decision() {
    let app = App::start().await;
    let terms = json!({ "proof_of_work_bits": BITS, "allocation": 40, "per_buyer_limit": 1 });
    let sale = app.sale(terms).await;
    let sale = id(&sale);
    let calls = async || -> f64 {
        let metrics = app.get("/metrics").await.text;
        let line = metrics
            .lines()
            .find(|line| line.starts_with("stockade_engine_calls_total"));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok())
            .unwrap_or_else(|| panic!("{metrics}"))
    };
    let swarm: Vec<Uuid> = (0..200).map(|_| clock::new_id()).collect();
    let stolen = proof(&app, sale, swarm[0], "order", "k").await;
    let before = calls().await;
    let body = json!({ "quantity": 1 }).to_string();
    let purchase = |buyer: Uuid| app.purchase(sale, buyer, "k", body.clone());
    let bare = swarm[1..].iter().map(|bot| purchase(*bot));
    let sharing = swarm[1..]
        .iter()
        .map(|bot| purchase(*bot).header(PROOF, &stolen));
    for answer in crowd(bare.chain(sharing)).await {
        assert_eq!(answer.status, 403, "{answer:?}");
    }
    assert!((calls().await - before).abs() < 0.5);
    // Whoever does the work buys, human or not.
    let mut working = Vec::new();
    for bot in &swarm[..40] {
        let proof = proof(&app, sale, *bot, "order", "k").await;
        working.push(purchase(*bot).header(PROOF, proof));
    }
    for answer in crowd(working).await {
        answer.expect(201);
    }
    assert_eq!(app.view(sale).await["sold_out"], true);
    app.finish().await;
}
