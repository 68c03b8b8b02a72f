//! What is refused wherever it is asked: routes and methods that do not exist. And what every
//! answer has: an id, the same words under both prefixes, a page that explains its code.

use reqwest::Method;
use serde_json::{Value, json};
use stockade::{auth::Role, clock};
use uuid::Uuid;

use super::{CODES, refused};
use crate::support::app::{App, id, send};

#[tokio::test]
async fn routes_and_methods_that_do_not_exist_are_refused() {
    let app = App::start().await;
    let sale = app.sale(json!({})).await;
    let sale = format!("/v1/sales/{}", id(&sale));
    for path in [
        "/",
        "/v1",
        "/v1/",
        "/v2/sales",
        "/v1/sale",
        "/v1/sales/",
        "/api",
        "/%00",
        "/metrics/",
        "/docs/problems/nothing",
        "/..%2f..%2fetc/passwd",
    ] {
        for method in [Method::GET, Method::POST, Method::DELETE] {
            let answer = send(app.request(method.clone(), path)).await;
            assert!(
                answer.status == 404 || (path.starts_with("/docs") && method != Method::GET),
                "{method} {path}: {answer:?}"
            );
            if answer.status == 404 {
                refused(&answer, "not_found", "never", json!({}));
            }
        }
        let answer = send(app.request(Method::HEAD, path)).await.expect(404);
        assert_eq!(answer.text, "");
        assert_eq!(
            answer.header("content-type"),
            Some("application/problem+json")
        );
    }

    for (path, allowed) in [
        ("/v1/products", "GET,HEAD,POST"),
        ("/v1/sales", "GET,HEAD,POST"),
        ("/v1/orders", "GET,HEAD"),
        (&format!("{sale}/orders"), "POST"),
        (&format!("{sale}/pause"), "POST"),
        (&format!("{sale}/leaderboard"), "GET,HEAD"),
        (&format!("{sale}/audit"), "GET,HEAD"),
        ("/v1/auth/login", "POST"),
        ("/livez", "GET,HEAD"),
    ] {
        for method in [Method::PUT, Method::DELETE, Method::TRACE, brew()] {
            let answer = send(app.operate(method, path)).await;
            assert_eq!(answer.status, 405, "{path}: {answer:?}");
            refused(&answer, "method_not_allowed", "never", json!({}));
            assert_eq!(answer.header("allow"), Some(allowed), "{path}");
        }
        let answer = send(app.request(Method::OPTIONS, path)).await.expect(204);
        assert_eq!(
            (answer.header("allow"), answer.text.as_str()),
            (Some(allowed), "")
        );
        if allowed.contains("HEAD") {
            let head = send(app.operate(Method::HEAD, path)).await.expect(200);
            let get = send(app.operate(Method::GET, path)).await.expect(200);
            assert_eq!(
                (head.text.as_str(), head.header("content-type")),
                ("", get.header("content-type"))
            );
        }
    }
    app.finish().await;
}

fn brew() -> Method {
    Method::from_bytes(b"BREW").unwrap()
}

#[tokio::test]
async fn both_prefixes_answer_in_the_same_words() {
    let app = App::start().await;
    // Of what is refused here nothing comes from memory, whose refusals are less final.
    let sale = app.sale(json!({"allocation": 2})).await;
    let sale = id(&sale);
    app.buy(sale, clock::new_id(), "k", 1).await.expect(201);
    let buyer = app.token(clock::new_id(), Role::Buyer);
    let nobody = Uuid::from_u128(7);
    let one = json!({"quantity": 1});
    for (method, path, body) in [
        (
            Method::POST,
            format!("sales/{sale}/orders"),
            json!({"quantity": 2}),
        ),
        (
            Method::POST,
            format!("sales/{sale}/orders"),
            json!({"quantity": 0}),
        ),
        (
            Method::POST,
            format!("sales/{sale}/orders"),
            json!({"quantity": "1"}),
        ),
        (Method::POST, format!("sales/{nobody}/orders"), one.clone()),
        (Method::POST, format!("sales/{sale}/pause"), one.clone()),
        (Method::POST, "sales".to_owned(), one.clone()),
        (Method::POST, "auth/login".to_owned(), one.clone()),
        (Method::POST, "nowhere".to_owned(), one.clone()),
        (Method::PUT, "sales".to_owned(), one),
        (Method::GET, "sales?limit=0".to_owned(), Value::Null),
        (Method::GET, format!("orders/{nobody}"), Value::Null),
    ] {
        let ask = async |prefix: &str| {
            let mut request = app
                .request(method.clone(), &format!("/{prefix}/{path}"))
                .bearer_auth(&buyer)
                .header("idempotency-key", "k")
                .header("x-request-id", "same");
            if !body.is_null() {
                request = request.json(&body);
            }
            send(request).await
        };
        let (v1, api) = (ask("v1").await, ask("api").await);
        assert!(v1.status.is_client_error(), "{method} {path}: {v1:?}");
        assert_eq!(
            (v1.status, v1.json()),
            (api.status, api.json()),
            "{method} {path}"
        );
        let names = |answer: &crate::support::app::Answer| {
            let mut names: Vec<_> = answer.headers.keys().map(ToString::to_string).collect();
            names.sort();
            names
        };
        assert_eq!(names(&v1), names(&api), "{method} {path}");
    }
    let bought = app
        .get(&format!("/api/sales/{sale}"))
        .await
        .expect(200)
        .json();
    assert_eq!(bought["remaining"], 1);
    app.finish().await;
}

#[tokio::test]
async fn every_answer_has_the_id_of_its_request() {
    let app = App::start().await;
    let longest = "x".repeat(128);
    for (given, kept) in [
        ("my-id/7", true),
        (longest.as_str(), true),
        (&format!("{longest}x"), false),
        ("two words", false),
        ("", false),
        ("schlüssel", false),
    ] {
        for (method, path) in [
            (Method::GET, "/livez"),
            (Method::GET, "/v1/sales"),
            (Method::GET, "/nowhere"),
            (Method::POST, "/v1/sales"),
            (Method::GET, "/openapi.json"),
            (Method::OPTIONS, "/v1/sales"),
        ] {
            let request = app
                .request(method, path)
                .header("x-request-id", given.as_bytes());
            let answer = send(request).await;
            let id = answer.header("x-request-id").unwrap();
            assert_eq!(id == given, kept, "{path}: {given:?} became {id:?}");
            assert!(kept || Uuid::parse_str(id).is_ok(), "{path}: {id:?}");
            if answer.status.is_client_error() {
                assert_eq!(answer.json()["instance"], id, "{path}");
            }
        }
    }
    app.finish().await;
}

/// What a page refers to.
fn references(html: &str) -> Vec<&str> {
    ["src=\"", "href=\""]
        .iter()
        .flat_map(|attribute| html.split(attribute).skip(1))
        .map(|rest| rest.split('"').next().unwrap())
        .collect()
}

#[tokio::test]
async fn every_code_has_a_page_and_all_pages_come_from_here() {
    let app = App::start().await;
    for (code, status, title) in CODES {
        let page = app.get(&format!("/docs/problems/{code}")).await.expect(200);
        assert_eq!(
            page.header("content-type"),
            Some("text/html; charset=utf-8")
        );
        for text in [*code, *title, &status.to_string()] {
            assert!(page.text.contains(text), "{code}: {text}");
        }
    }
    let index = app.get("/docs/problems").await.expect(200);
    for (code, ..) in CODES {
        assert!(
            index.text.contains(&format!("/docs/problems/{code}")),
            "{code}"
        );
    }

    for path in ["/docs", "/docs/problems", "/docs/problems/sold_out"] {
        let page = app.get(path).await.expect(200);
        assert!(
            !page.text.contains("http://") && !page.text.contains("https://"),
            "{path}"
        );
        let found = references(&page.text);
        assert!(!found.is_empty(), "{path} refers to nothing");
        for reference in found {
            // The interactive pages name their files relative to themselves.
            let file = reference.trim_start_matches("./");
            let target = match reference.strip_prefix('/') {
                Some(_) => file.to_owned(),
                None => format!("/docs/{file}"),
            };
            assert!(
                target.starts_with('/') && !target.starts_with("//"),
                "{path}: {reference}"
            );
            app.get(&target).await.expect(200);
        }
    }
    let start = app
        .get("/docs/swagger-initializer.js")
        .await
        .expect(200)
        .text;
    assert!(
        start.contains("/openapi.json") && !start.contains("://"),
        "{start}"
    );

    let openapi = app.get("/openapi.json").await.expect(200).json();
    let version = openapi["openapi"].as_str().unwrap();
    assert!(version.starts_with("3.1"), "{version}");
    let paths = openapi["paths"].as_object().unwrap();
    for path in [
        "/v1/sales/{id}/orders",
        "/v1/sales/{id}/leaderboard",
        "/v1/sales/{id}/audit",
    ] {
        assert!(paths.contains_key(path), "{path}");
    }
    app.finish().await;
}
