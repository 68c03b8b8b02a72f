//! Limits per user, address and account, over HTTP and on several nodes.

use std::{fmt::Display, net::Ipv4Addr, time::Duration};

use reqwest::{Method, RequestBuilder};
use rustix::process::Signal;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use stockade::auth::Role;
use uuid::Uuid;

use super::support::{
    Redis,
    app::{Answer, App, Node, PATIENCE, id, send},
    wire::Wire,
};

/// An application with limits; the tests' own requests come from a proxy that is believed.
fn limited(limits: &'static str) -> [(&'static str, &'static str); 3] {
    [
        ("STOCKADE_RATE_LIMIT", "on"),
        ("STOCKADE_LIMITS", limits),
        ("STOCKADE_TRUSTED_PROXIES", "127.0.0.0/8"),
    ]
}

/// The same request, from elsewhere.
fn from(address: &(impl Display + ?Sized), request: RequestBuilder) -> RequestBuilder {
    request.header("X-Forwarded-For", format!("{address}"))
}

fn address(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(203, 0, 113, last)
}

fn me(app: &App, user: Uuid) -> RequestBuilder {
    app.request(Method::GET, "/v1/me")
        .bearer_auth(app.token(user, Role::Buyer))
}

/// The answer says that this limit was met, and nothing else.
#[track_caller]
fn is_refused_by(answer: &Answer, rule: &str) {
    let body = answer.json();
    assert_eq!(
        (answer.status.as_u16(), &body["code"]),
        (429, &json!("rate_limited")),
        "{body}"
    );
    assert_eq!(
        (&body["outcome"], &body["retry"]),
        (&json!("not_applied"), &json!("after"))
    );
    let policy = answer.header("ratelimit-policy").unwrap();
    assert!(policy.starts_with(&format!("\"{rule}\";q=")), "{policy}");
}

#[tokio::test]
async fn a_buyer_gets_exactly_what_is_allowed_and_is_told_what_that_is() {
    let app = App::start_with(&limited("user.purchase=3+1/h")).await;
    let sale = app
        .sale(json!({ "allocation": 9, "per_buyer_limit": 9 }))
        .await;
    let (sale, buyer) = (id(&sale), Uuid::from_u128(1));
    for key in ["a", "b", "c"] {
        app.buy(sale, buyer, key, 1).await.expect(201);
    }
    let refused = app.buy(sale, buyer, "d", 1).await;
    is_refused_by(&refused, "user.purchase");
    assert_eq!(
        refused.header("ratelimit-policy"),
        Some("\"user.purchase\";q=3;w=10800")
    );
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((3_500..=3_600).contains(&wait), "{wait}");
    let left = format!("\"user.purchase\";r=0;t={wait}");
    assert_eq!(refused.header("ratelimit"), Some(left.as_str()));
    // A retry is a request like any other; the others go on; nothing was taken.
    is_refused_by(&app.buy(sale, buyer, "a", 1).await, "user.purchase");
    app.buy(sale, Uuid::from_u128(2), "d", 1).await.expect(201);
    send(me(&app, buyer)).await.expect(200);
    assert_eq!(app.view(sale).await["remaining"], 5);
    app.finish().await;
}

#[tokio::test]
async fn only_a_trusted_proxy_says_where_somebody_is() {
    let read = async |app: &App, address: &str| {
        send(from(address, app.request(Method::GET, "/v1/products"))).await
    };
    let mut settings = limited("address.read=2+1/h");
    let app = App::start_with(&settings).await;
    for _ in 0..2 {
        read(&app, "2001:db8:1:2::1").await.expect(200);
    }
    is_refused_by(&read(&app, "2001:db8:1:2::ffff").await, "address.read");
    // What a client has written itself does not help it.
    is_refused_by(
        &read(&app, "198.51.100.9, 2001:db8:1:2::1").await,
        "address.read",
    );
    read(&app, "2001:db8:1:3::1").await.expect(200);
    // What watches over a node is never refused.
    for _ in 0..9 {
        send(from("2001:db8:1:2::1", app.request(Method::GET, "/livez")))
            .await
            .expect(200);
    }
    app.finish().await;

    settings[2].1 = "10.0.0.0/8";
    let app = App::start_with(&settings).await;
    for last in 0..2 {
        read(&app, &address(last).to_string()).await.expect(200);
    }
    is_refused_by(&read(&app, &address(9).to_string()).await, "address.read");
    app.abandon().await;
}

#[tokio::test]
async fn addresses_of_ones_own_are_not_counted_but_their_users_are() {
    let mut settings = limited("address.read=1+1/h,user.read=3+1/h").to_vec();
    settings.push(("STOCKADE_UNLIMITED_ADDRESSES", "127.0.0.0/8"));
    let app = App::start_with(&settings).await;
    for _ in 0..9 {
        app.get("/v1/products").await.expect(200);
    }
    for _ in 0..3 {
        send(me(&app, Uuid::nil())).await.expect(200);
    }
    is_refused_by(&send(me(&app, Uuid::nil())).await, "user.read");
    app.finish().await;
}

/// Two nodes that count together.
async fn two_nodes(limits: &'static str) -> (Redis, App, Node) {
    let cache = Redis::start_cache().await;
    let mut app = App::without_node(&limited(limits)).await;
    app.cache = Some(cache.address.clone());
    app.run().await;
    let other = app.node().await;
    (cache, app, other)
}

async fn metric(app: &App, name: &str) -> String {
    let metrics = app.get("/metrics").await.text;
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name}")).to_owned()
}

#[tokio::test]
async fn nodes_count_together_and_whoever_is_refused_costs_redis_nothing() {
    let (cache, app, other) = two_nodes("user.read=8+1/h").await;
    let user = Uuid::from_u128(7);
    for _ in 0..8 {
        send(me(&app, user)).await.expect(200);
    }
    is_refused_by(&send(me(&app, user)).await, "user.read");
    // The other node lets one request through, tells of it, and hears of the others.
    send(other.ask(me(&app, user))).await.expect(200);
    let mut wire = Wire::to(cache.address.expose_secret()).await;
    let key = format!("stockade:limit:user.read:{:032x}", user.as_u128());
    let nine = 9 * 3_600_000 - 600_000;
    let told = async {
        while wire
            .run(&["PTTL", &key])
            .await
            .trim_start_matches(':')
            .parse::<i64>()
            .unwrap()
            < nine
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, told).await.unwrap();
    let mut more = 0;
    while send(other.ask(me(&app, user))).await.status != 429 {
        more += 1;
        assert!(more < 7, "the nodes count apart");
    }
    let calls = async |wire: &mut Wire| {
        let stats = wire.ask(&["INFO", "commandstats"]).await.concat();
        let calls = stats.split("cmdstat_evalsha:calls=").nth(1).unwrap();
        calls.split(',').next().unwrap().to_owned()
    };
    // Its last word may still be on the way.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let before = calls(&mut wire).await;
    for _ in 0..50 {
        is_refused_by(&send(me(&app, user)).await, "user.read");
        is_refused_by(&send(other.ask(me(&app, user))).await, "user.read");
    }
    assert_eq!(calls(&mut wire).await, before);
    assert_eq!(metric(&app, "stockade_limits_alone").await, "0");
    other.stop().await;
    app.finish().await;
}

#[tokio::test]
async fn without_the_cache_redis_each_node_sells_and_counts_alone() {
    let (cache, app, other) = two_nodes("user.purchase=2+1/h").await;
    let sale = app
        .sale(json!({ "allocation": 9, "per_buyer_limit": 9 }))
        .await;
    cache.server.signal(Signal::STOP);
    let buyer = Uuid::from_u128(1);
    for key in ["a", "b"] {
        app.buy(id(&sale), buyer, key, 1).await.expect(201);
    }
    is_refused_by(&app.buy(id(&sale), buyer, "c", 1).await, "user.purchase");
    let purchase = app.purchase(id(&sale), buyer, "c", json!({ "quantity": 1 }).to_string());
    send(other.ask(purchase)).await.expect(201);
    let alone = async |expected: &str| {
        let change = async {
            let mut user = 100;
            while metric(&app, "stockade_limits_alone").await != expected {
                // Something to tell.
                user += 1;
                app.buy(id(&sale), Uuid::from_u128(user), "k", 9).await;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, change).await.unwrap();
    };
    alone("1").await;
    cache.server.signal(Signal::CONT);
    alone("0").await;
    other.stop().await;
    app.finish().await;
}

fn credentials(email: &str, password: &str) -> Value {
    json!({ "email": email, "password": password })
}

async fn log_in(app: &App, from_where: u8, email: &str, password: &str) -> Answer {
    let request = app
        .request(Method::POST, "/v1/auth/login")
        .json(&credentials(email, password));
    send(from(&address(from_where), request)).await
}

async fn register(app: &App, from_where: u8, email: &str) -> Answer {
    let mut body = credentials(email, "correct horse battery staple");
    body["name"] = "Ada".into();
    let request = app.request(Method::POST, "/v1/auth/register").json(&body);
    send(from(&address(from_where), request)).await
}

#[tokio::test]
async fn strangers_who_try_passwords_shut_no_victim_out() {
    const RIGHT: &str = "correct horse battery staple";
    let cache = Redis::start_cache().await;
    let mut app = App::without_node(&limited(
        "pair.login=4+1/h,account.login=9+1/h,address.login=30+1/h",
    ))
    .await;
    app.cache = Some(cache.address.clone());
    app.run().await;
    let (victim, unknown) = ("ada@example.org", "nobody@example.org");
    register(&app, 1, victim).await.expect(201);
    log_in(&app, 1, victim, RIGHT).await.expect(200);

    // Neither status nor body tells whether there is such an account, before the limit or at it.
    let bare = |answer: Answer| {
        let mut body = answer.json();
        body.as_object_mut().unwrap().remove("instance");
        (
            answer.status,
            body,
            answer.header("ratelimit-policy").map(str::to_owned),
        )
    };
    for attempt in 0..6 {
        let (known, unknown) = (
            bare(log_in(&app, 9, victim, "wrong password").await),
            bare(log_in(&app, 9, unknown, "wrong password").await),
        );
        assert_eq!(known, unknown);
        assert_eq!(known.0, if attempt < 4 { 401 } else { 429 });
    }
    // The right password does not help where too many were tried, and does elsewhere.
    is_refused_by(&log_in(&app, 9, victim, RIGHT).await, "pair.login");
    log_in(&app, 2, victim, RIGHT).await.expect(200);

    // Whoever tries from many addresses closes the account to addresses that it was never used from.
    for stranger in 20..40 {
        log_in(&app, stranger, victim, "wrong password").await;
    }
    is_refused_by(&log_in(&app, 40, victim, RIGHT).await, "account.login");
    for known in [1, 2] {
        log_in(&app, known, victim, RIGHT).await.expect(200);
    }
    app.finish().await;
}

#[tokio::test]
async fn an_address_that_tries_many_accounts_or_makes_them_is_stopped_before_any_hash() {
    let limits = "address.login=3+1/h,address.register=2+1/h";
    let app = App::start_with(&limited(limits)).await;
    for account in 0..3 {
        let email = format!("{account}@example.org");
        log_in(&app, 9, &email, "wrong password").await.expect(401);
    }
    is_refused_by(
        &log_in(&app, 9, "3@example.org", "wrong password").await,
        "address.login",
    );
    for account in 0..2 {
        register(&app, 9, &format!("{account}@example.org"))
            .await
            .expect(201);
    }
    is_refused_by(
        &register(&app, 9, "2@example.org").await,
        "address.register",
    );
    register(&app, 8, "2@example.org").await.expect(201);
    app.finish().await;
}
