//! Texts that would like to be keys, scripts, statements or lines of a log, and numbers at the edges,
//! in every place of the OpenAPI document that takes one: a new place is tried without being named here.

use std::{collections::BTreeMap, fmt::Write, fs};

use reqwest::{
    Method, RequestBuilder,
    header::{HeaderName, HeaderValue},
};
use serde_json::{Value, json};
use stockade::{auth::Role, clock};
use tempfile::TempDir;
use uuid::Uuid;

use crate::{
    selling::rows,
    support::{
        app::{Answer, App, crowd, id, send, sql, try_send},
        process::{Machine, Served},
        wire::Wire,
    },
};

/// A line of a log, if it gets out of the one that quotes it.
const FORGED: &str = "x\n{\"level\":\"ERROR\",\"forged\":true}\n";

const TEXTS: &[&str] = &[
    // Keys and hash tags.
    "{p1}:meta",
    "}{p0}:journal{",
    "p0}:sale:1",
    ":",
    "*",
    // The protocol of Redis, and its scripts.
    "\r\nSET foreign 1\r\n",
    "*1\r\n$8\r\nFLUSHALL\r\n",
    "') redis.call('FLUSHALL') --",
    "]] redis.call('FLUSHALL') --[[",
    // SQL.
    "' OR '1'='1",
    "'; DROP TABLE orders; --",
    "\\'; DROP TABLE orders; --",
    "$1",
    "%",
    // Lines and terminals.
    FORGED,
    "\u{1b}[2J",
    "\u{0}",
    "a\u{0}b",
    // What looks like something else.
    "\u{430}dmin",
    "\u{ff21}dmin",
    "\u{202e}gnp.exe",
    "\u{200b}",
    "e\u{301}",
    "\u{ffff}",
    "😀",
    "ada@\u{435}xample.org",
    // Other worlds.
    "../../etc/passwd",
    "${jndi:ldap://x}",
    "<script>alert(1)</script>",
    "null",
    "-0",
    "1e9",
];

/// Numbers that no member can be read from.
const NO_INTEGERS: &[&str] = &[
    "9223372036854775808",
    "-9223372036854775809",
    "18446744073709551616",
    "1.5",
    "1.0",
    "1e0",
    "1E2",
    "1e400",
    "-0.0",
    "\"1\"",
    "true",
    "[1]",
    "{}",
];

/// What is not even JSON.
const NO_JSON: &[&str] = &[
    "01", "+1", "0x10", "NaN", "Infinity", "1_000", ".5", "1.", "٣",
];

/// Whole numbers at the edges of what a double, a Lua number and 64 bits hold.
const EDGES: &[i64] = &[
    i64::MIN,
    -(1 << 53) - 1,
    -1,
    0,
    i32::MAX as i64 + 1,
    u32::MAX as i64 + 1,
    (1 << 53) - 1,
    1 << 53,
    (1 << 53) + 1,
    i64::MAX,
];

/// An operation of the document.
struct Operation<'a> {
    method: Method,
    path: String,
    /// Names of the members of its query, and whether they are numbers.
    query: Vec<(String, bool)>,
    body: Option<&'a Value>,
}

/// A place in a body: where it is, and what its schema says.
struct Place<'a> {
    pointer: String,
    schema: &'a Value,
}

fn operations(document: &Value) -> Vec<Operation<'_>> {
    let mut found = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        // Streams never end, and whoever logs out everywhere does not come back.
        if path.ends_with("/events") || path.ends_with("/logout-all") {
            continue;
        }
        for (method, operation) in item.as_object().unwrap() {
            let Ok(method) = Method::from_bytes(method.to_uppercase().as_bytes()) else {
                continue;
            };
            let parameters = operation["parameters"].as_array();
            let query = parameters.into_iter().flatten();
            let query = query.filter(|parameter| parameter["in"] == "query");
            found.push(Operation {
                method,
                path: path.clone(),
                query: query
                    .map(|one| {
                        let name = one["name"].as_str().unwrap().to_owned();
                        (name, kind(&one["schema"]) == "integer")
                    })
                    .collect(),
                body: operation
                    .pointer("/requestBody/content/application~1json/schema")
                    .map(|schema| resolved(document, schema)),
            });
        }
    }
    found
}

/// What a reference or an alternative stands for.
fn resolved<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    if let Some(path) = schema["$ref"].as_str() {
        return resolved(document, document.pointer(&path[1..]).unwrap());
    }
    for word in ["allOf", "oneOf", "anyOf"] {
        let some = schema[word].as_array().into_iter().flatten();
        if let Some(one) = some.rev().find(|one| one["type"] != "null") {
            return resolved(document, one);
        }
    }
    schema
}

fn kind(schema: &Value) -> &str {
    let kinds = schema["type"].as_array().into_iter().flatten();
    let known = kinds.filter_map(Value::as_str).find(|kind| *kind != "null");
    known.or(schema["type"].as_str()).unwrap_or_default()
}

/// A body with every member.
fn sample(document: &Value, schema: &Value, ids: &BTreeMap<&str, String>, name: &str) -> Value {
    let schema = resolved(document, schema);
    if let Some(id) = ids.get(name) {
        return json!(id);
    }
    match kind(schema) {
        // Windows are instead of everything else that a schedule says.
        "object" => schema["properties"]
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(name, _)| *name != "windows")
            .map(|(name, member)| (name.clone(), sample(document, member, ids, name)))
            .collect(),
        "array" => json!([sample(document, &schema["items"], ids, name)]),
        "integer" => schema.get("minimum").cloned().unwrap_or(json!(1)),
        "boolean" => json!(false),
        _ => match (
            schema["format"].as_str(),
            &schema["enum"][0],
            &schema["example"],
        ) {
            (Some("date-time"), ..) => json!("2031-01-01T00:00:00.000Z"),
            (Some("uuid"), ..) => json!(Uuid::from_u128(9)),
            (_, Value::String(one), _) | (_, _, Value::String(one)) => json!(one),
            _ => json!("Ada"),
        },
    }
}

fn places<'a>(document: &'a Value, schema: &'a Value, at: &str, wanted: &str) -> Vec<Place<'a>> {
    let schema = resolved(document, schema);
    let here = (kind(schema) == wanted).then(|| Place {
        pointer: at.to_owned(),
        schema,
    });
    let members = schema["properties"].as_object().into_iter().flatten();
    let members = members.filter(|(name, _)| *name != "windows");
    let members = members.map(|(name, member)| (format!("{at}/{name}"), member));
    let items = schema.get("items").map(|item| (format!("{at}/0"), item));
    let below = members
        .chain(items)
        .flat_map(|(at, schema)| places(document, schema, &at, wanted));
    here.into_iter().chain(below).collect()
}

/// Puts the text of a JSON value into a place.
fn with(body: &Value, pointer: &str, raw: &str) -> String {
    let mut body = body.clone();
    *body.pointer_mut(pointer).unwrap() = json!("@@@");
    body.to_string().replace("\"@@@\"", raw)
}

/// Escaped as a part of an address.
fn escaped(text: &str) -> String {
    text.bytes().fold(String::new(), |mut escaped, byte| {
        let _ = write!(escaped, "%{byte:02X}");
        escaped
    })
}

/// It was understood or refused, and says nothing of the inside.
#[track_caller]
fn sane(answer: &Answer, what: &str) {
    assert!(answer.status.as_u16() < 500, "{what}: {answer:?}");
    if answer.status.is_client_error() {
        let kind = answer.header("content-type");
        assert_eq!(kind, Some("application/problem+json"), "{what}: {answer:?}");
        for inside in [
            "user_script",
            "NOPERM",
            "syntax error",
            "sqlx",
            "pg_catalog",
        ] {
            assert!(!answer.text.contains(inside), "{what}: {answer:?}");
        }
    }
}

/// A running server with something to aim at.
struct Target {
    app: App,
    node: Served,
    dir: TempDir,
    ids: BTreeMap<&'static str, String>,
    tokens: [String; 2],
}

impl Target {
    async fn start() -> Self {
        let dir = TempDir::new().unwrap();
        let mut app = App::without_node(&[
            ("STOCKADE_LOG", "debug"),
            ("STOCKADE_LOG_FORMAT", "json"),
            ("STOCKADE_ACCESS_LOG", "json"),
        ])
        .await;
        let file = dir.path().join("access.log");
        app.set("STOCKADE_ACCESS_LOG_FILE", file.to_str().unwrap());
        let node = Served::start_on(&app, Machine::default()).await;
        app.speak_to(node.url());
        app.ready().await;
        let sale = app
            .sale(json!({ "allocation": 1000, "hold_seconds": 600 }))
            .await;
        let ids = BTreeMap::from([
            ("sale_id", id(&sale).to_owned()),
            (
                "product_id",
                sale["product_id"].as_str().unwrap().to_owned(),
            ),
        ]);
        let user = clock::new_id();
        let tokens = [Role::Admin, Role::Buyer].map(|role| app.token(user, role));
        Self {
            app,
            node,
            dir,
            ids,
            tokens,
        }
    }

    /// A request to an operation on what is there, by somebody who may ask.
    async fn token(&self, operation: &Operation<'_>) -> &str {
        let path = self.path(operation, None);
        let request = self.app.request(operation.method.clone(), &path);
        let asked = send(request.bearer_auth(&self.tokens[0]).body("[")).await;
        &self.tokens[usize::from(asked.status == 403)]
    }

    fn path(&self, operation: &Operation<'_>, id: Option<&str>) -> String {
        let own = match operation.path.split('/').nth(2).unwrap_or_default() {
            "sales" => &self.ids["sale_id"],
            "products" => &self.ids["product_id"],
            _ => "00000000-0000-0000-0000-000000000009",
        };
        let mut path = operation.path.replace("{round}", id.unwrap_or("1"));
        for name in ["{id}", "{image}", "{file}", "{reference}", "{gateway}"] {
            path = path.replace(name, id.unwrap_or(own));
        }
        path
    }

    fn request(&self, token: &str, method: &Method, path: &str) -> RequestBuilder {
        self.app
            .request(method.clone(), path)
            .bearer_auth(token)
            .header("Idempotency-Key", clock::new_id().to_string())
            .header("Content-Type", "application/json")
    }

    /// The end: nothing but Stockade's own keys, as many orders as were answered, logs of whole lines.
    async fn unharmed(mut self, orders: usize) {
        let audit = self.app.audit(&self.ids["sale_id"]).await;
        assert_eq!(audit["verdict"], "pass", "{audit:#}");
        assert_eq!(rows(&self.app, &self.ids["sale_id"]).await.len(), orders);
        let keys = Wire::connect(&self.app.redis)
            .await
            .ask(&["KEYS", "*"])
            .await;
        for key in keys {
            let known = |rest: &str| {
                let words: Vec<_> = rest.split(':').collect();
                let number = |word: &str| word.parse::<u32>().is_ok();
                match words[..] {
                    ["meta" | "journal"] => true,
                    ["sale", sale] | ["sale", sale, "orders" | "buyers" | "ops"] => number(sale),
                    ["round", round]
                    | [
                        "round",
                        round,
                        "buyers" | "board" | "holds" | "line" | "wishes",
                    ] => {
                        let parts = round.split_once('.');
                        parts.is_some_and(|(sale, round)| number(sale) && number(round))
                    }
                    _ => false,
                }
            };
            assert!(key.strip_prefix("{p0}:").is_some_and(known), "{key}");
        }
        let mut sql = sql(&self.app).await;
        let tables: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM pg_tables WHERE tablename IN ('orders', 'users', 'sales')",
        )
        .fetch_one(&mut sql)
        .await
        .unwrap();
        assert_eq!(tables, 3);
        self.node.stop().await;
        let lines = fs::read_to_string(self.dir.path().join("access.log")).unwrap();
        for line in self.node.log().lines().chain(lines.lines()) {
            let event: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
            assert!(event.get("forged").is_none(), "{line}");
        }
        assert!(lines.lines().count() > 100);
        self.app.abandon().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_text_breaks_out_of_its_place() {
    let target = Target::start().await;
    let document = target.app.get("/openapi.json").await.json();
    let (mut paths, mut queries, mut bodies) = (0, 0, 0);
    for operation in operations(&document) {
        let token = target.token(&operation).await;
        let name = format!("{} {}", operation.method, operation.path);
        let ask = |path: &str, body: Option<String>| {
            let request = target.request(token, &operation.method, path);
            request.body(body.unwrap_or_else(|| "{}".to_owned()))
        };
        let mut requests = Vec::new();
        let is_named = operation.path.contains('{');
        for text in TEXTS {
            let text = escaped(text);
            if is_named {
                paths += 1;
                requests.push(ask(&target.path(&operation, Some(&text)), None));
            }
            for (member, _) in &operation.query {
                queries += 1;
                let path = target.path(&operation, None);
                requests.push(ask(&format!("{path}?{member}={text}"), None));
            }
        }
        if let Some(schema) = operation.body {
            let body = sample(&document, schema, &target.ids, "");
            let texts = places(&document, schema, "", "string");
            // A hash takes its time: those wait for each other, and are fewer.
            let hashes = operation.path.contains("/auth/") || operation.path == "/v1/me";
            for place in texts {
                for text in TEXTS.iter().step_by(if hashes { 6 } else { 1 }) {
                    bodies += 1;
                    let body = with(&body, &place.pointer, &json!(text).to_string());
                    let request = ask(&target.path(&operation, None), Some(body));
                    if hashes {
                        sane(
                            &send(request).await,
                            &format!("{name} {} {text}", place.pointer),
                        );
                    } else {
                        requests.push(request);
                    }
                }
            }
        }
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            for answer in crowd(requests.by_ref().take(32)).await {
                sane(&answer, &name);
            }
        }
    }
    println!("{paths} in paths, {queries} in queries, {bodies} in bodies");
    assert!(paths > 500 && queries > 500 && bodies > 500);

    // In headers, as far as a header can hold them, and where a key of a buyer may be nearly anything.
    let sale = &target.ids["sale_id"];
    let mut orders = 0;
    for text in TEXTS
        .iter()
        .map(|text| text.as_bytes())
        .chain([&b"\xff\xfe{p1}"[..]])
    {
        let Ok(value) = HeaderValue::from_bytes(text) else {
            continue;
        };
        for name in [
            "idempotency-key",
            "if-match",
            "user-agent",
            "referer",
            "x-request-id",
            "x-forwarded-for",
            "forwarded",
            "origin",
            "cookie",
            "accept",
            "traceparent",
            "last-event-id",
        ] {
            let name = HeaderName::from_static(name);
            let request = target
                .app
                .request(Method::GET, &format!("/v1/sales/{sale}"));
            sane(&send(request.header(&name, &value)).await, name.as_str());
        }
        let buyer = clock::new_id();
        let buy = || {
            let path = format!("/v1/sales/{sale}/orders");
            let request = target.app.request(Method::POST, &path);
            request
                .bearer_auth(target.app.token(buyer, Role::Buyer))
                .header("Idempotency-Key", &value)
                .json(&json!({ "quantity": 1 }))
        };
        let bought = send(buy()).await;
        sane(&bought, "a key");
        if bought.status == 201 {
            orders += 1;
            let again = send(buy()).await.expect(201);
            assert_eq!(again.header("idempotency-replayed"), Some("true"));
            assert_eq!(again.text, bought.text);
        }
    }
    assert!(orders > 10, "{orders}");

    // A text that is taken is the one that is given back.
    for text in TEXTS {
        let price = json!({ "amount": 1, "currency": "EUR" });
        let product = json!({ "name": text, "description": text, "price": price });
        let made = target
            .app
            .operate(Method::POST, "/v1/products")
            .json(&product);
        let made = send(made).await;
        sane(&made, text);
        if made.status == 201 {
            let path = format!("/v1/products/{}", id(&made.json()));
            assert_eq!(
                target.app.get(&path).await.json()["name"],
                json!(text.trim())
            );
        }
    }

    // A mebibyte of it.
    let large = "{p0}:".repeat(1 << 18);
    let path = format!("/v1/sales/{sale}/orders");
    let token = &target.tokens[1];
    for request in [
        target
            .request(token, &Method::POST, &path)
            .body(json!({ "quantity": large }).to_string()),
        target
            .request(token, &Method::POST, &path)
            .header("x-note", &large)
            .body("{}"),
        target.request(token, &Method::GET, &format!("/v1/sales?cursor={large}")),
    ] {
        // The server need not listen to the end.
        if let Ok(answer) = try_send(request).await {
            assert!(
                [413, 414, 431].contains(&answer.status.as_u16()),
                "{answer:?}"
            );
        }
    }
    target.unharmed(orders).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_number_at_an_edge_is_taken_for_another() {
    let target = Target::start().await;
    let document = target.app.get("/openapi.json").await.json();
    let (mut members, mut queries, mut wrong) = (0, 0, Vec::new());
    for operation in operations(&document) {
        let token = target.token(&operation).await;
        let path = target.path(&operation, None);
        for (member, is_number) in &operation.query {
            if !is_number {
                continue;
            }
            queries += 1;
            let edges: Vec<_> = EDGES.iter().map(i64::to_string).collect();
            let edges = edges.iter().map(String::as_str);
            for raw in edges.chain(NO_INTEGERS.iter().chain(NO_JSON).copied()) {
                let asked = format!("{path}?{member}={}", escaped(raw));
                let request = target.request(token, &operation.method, &asked);
                let answer = send(request).await;
                sane(&answer, &format!("{asked} ({raw})"));
                // In a query 01 and +1 are 1.
                let whole = raw.parse::<i64>().is_ok();
                assert!(whole || !answer.status.is_success(), "{raw}: {answer:?}");
            }
        }
        let Some(schema) = operation.body else {
            continue;
        };
        let body = sample(&document, schema, &target.ids, "");
        let now = send(target.request(token, &Method::GET, &path)).await;
        let version = now.header("etag").unwrap_or("\"0\"").to_owned();
        for Place { pointer, schema } in places(&document, schema, "", "integer") {
            members += 1;
            let name = format!("{} {path} {pointer}", operation.method);
            let ask = async |raw: &str| {
                let request = target.request(token, &operation.method, &path);
                let request = match operation.method {
                    Method::PATCH => request.header("If-Match", &version),
                    _ => request,
                };
                let answer = send(request.body(with(&body, &pointer, raw))).await;
                sane(&answer, &format!("{name} {raw}"));
                assert!(!answer.status.is_success(), "{name} {raw}: {answer:?}");
                answer
            };
            let places_of = |answer: &Answer| -> Vec<String> {
                let errors = answer.json()["errors"].take();
                let errors = errors.as_array().into_iter().flatten();
                let places = errors.map(|error| error["pointer"].as_str().unwrap().to_owned());
                places.collect()
            };
            let here = [format!("#{pointer}")];
            let mut note = |raw: &str, right: bool, answer: &Answer| {
                if !right {
                    wrong.push(format!("{name} {raw}: {} {}", answer.status, answer.text));
                }
            };
            for raw in NO_INTEGERS {
                let answer = ask(raw).await;
                let right = answer.status == 400 && places_of(&answer) == here;
                note(raw, right, &answer);
            }
            for raw in NO_JSON {
                let answer = ask(raw).await;
                note(raw, answer.status == 400, &answer);
            }
            let (Some(least), Some(most)) =
                (schema["minimum"].as_i64(), schema["maximum"].as_i64())
            else {
                wrong.push(format!("{name}: no bounds"));
                continue;
            };
            assert!(most < 1 << 53, "{name}: no number of Lua");
            let beside = [least - 1, most + 1];
            for number in EDGES.iter().chain(&beside) {
                if !(least..=most).contains(number) {
                    let raw = number.to_string();
                    let answer = ask(&raw).await;
                    let told = places_of(&answer).contains(&here[0]);
                    let elsewhere = [404, 409, 412].contains(&answer.status.as_u16());
                    note(&raw, told || elsewhere, &answer);
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    println!("{members} members, {queries} of queries");
    assert!(members > 20 && queries > 10);
    target.unharmed(0).await;
}
