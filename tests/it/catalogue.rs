//! The catalogue: images, search, standing sales, and what a crowd costs that only looks.

use std::{io::Cursor, time::Duration};

use image::{DynamicImage, ImageFormat, Rgb, RgbImage};
use reqwest::{Method, RequestBuilder};
use rustix::process::Signal;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use sqlx::Executor;
use stockade::auth::Role;
use uuid::Uuid;

use super::support::{
    Redis,
    app::{Answer, App, PATIENCE, crowd, id, send, sql},
    wire::Wire,
};

/// A sound image; each `shade` is another file.
fn picture(format: ImageFormat, width: u32, height: u32, shade: u8) -> Vec<u8> {
    let pixels = RgbImage::from_pixel(width, height, Rgb([shade, 0, 0]));
    let mut bytes = Cursor::new(Vec::new());
    DynamicImage::ImageRgb8(pixels)
        .write_to(&mut bytes, format)
        .unwrap();
    bytes.into_inner()
}

fn lamp(name: &str, amount: i64) -> Value {
    json!({"name": name, "description": "It shines.", "price": {"amount": amount, "currency": "EUR"}})
}

async fn add(app: &App, product: &Value) -> Answer {
    send(app.operate(Method::POST, "/v1/products").json(product)).await
}

fn upload(app: &App, product: &str, media_type: &str, file: Vec<u8>) -> RequestBuilder {
    app.operate(Method::POST, &format!("/v1/products/{product}/images"))
        .header("Content-Type", media_type)
        .body(file)
}

async fn patch(app: &App, product: &str, version: &str, change: Value) -> Answer {
    let request = app.operate(Method::PATCH, &format!("/v1/products/{product}"));
    send(request.header("If-Match", version).json(&change)).await
}

fn names(page: &Answer) -> Vec<String> {
    let page = page.json();
    let rows = page["data"].as_array().unwrap();
    let name = |row: &Value| row["name"].as_str().unwrap().to_owned();
    rows.iter().map(name).collect()
}

#[tokio::test]
async fn images_are_made_shown_ordered_and_removed() {
    let app = App::start().await;
    let product = add(&app, &lamp("Lamp", 1999)).await.expect(201).json();
    let path = format!("/v1/products/{}", id(&product));
    assert_eq!(product["images"], json!([]));

    let photo = picture(ImageFormat::Jpeg, 1_500, 750, 200);
    let first = send(upload(&app, id(&product), "image/jpeg", photo.clone())).await;
    let first = first.expect(201);
    assert_eq!(first.header("etag"), Some("\"2\""));
    let first = first.json();
    assert_eq!(
        (&first["width"], &first["height"]),
        (&json!(1500), &json!(750))
    );
    let again = send(upload(&app, id(&product), "image/jpeg", photo)).await;
    assert_eq!(again.expect(200).json(), first);
    let small = picture(ImageFormat::Png, 40, 30, 9);
    let second = send(upload(&app, id(&product), "image/png; x=y", small)).await;
    let second = second.expect(201).json();

    let shown = app.get(&path).await.expect(200).json();
    assert_eq!(shown["images"], json!([first, second]));
    let listed = app.get("/v1/products").await.expect(200).json();
    assert_eq!(listed["data"][0]["images"], shown["images"]);

    let renditions = first["renditions"].as_array().unwrap();
    let widths: Vec<_> = renditions.iter().map(|r| r["width"].as_u64()).collect();
    assert_eq!(widths, [Some(160), Some(480), Some(1200)]);
    for rendition in renditions {
        let url = rendition["url"].as_str().unwrap();
        let answer = app.request(Method::GET, url).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        for (name, value) in [
            ("content-type", "image/jpeg"),
            ("cache-control", "public, max-age=31536000, immutable"),
            ("x-content-type-options", "nosniff"),
        ] {
            assert_eq!(answer.headers()[name], value, "{url}");
        }
        let etag = answer.headers()["etag"].clone();
        let bytes = answer.bytes().await.unwrap();
        let image = image::load_from_memory(&bytes).unwrap();
        assert_eq!(json!(image.width()), rendition["width"]);
        assert_eq!(json!(image.height()), rendition["height"]);
        let known = app.request(Method::GET, url).header("If-None-Match", &etag);
        let known = send(known).await.expect(304);
        assert_eq!(
            (known.text.as_str(), known.header("etag")),
            ("", etag.to_str().ok())
        );
        let head = send(app.request(Method::HEAD, url)).await.expect(200);
        assert_eq!(
            head.header("content-length"),
            Some(&*bytes.len().to_string())
        );
        // It has one address.
        for wrong in [
            url.replace(".jpg", ".webp"),
            url.replace(".jpg", ""),
            url.to_uppercase(),
        ] {
            app.get(&wrong).await.expect(404);
        }
    }

    let (one, two) = (first["id"].clone(), second["id"].clone());
    for wrong in [
        json!([]),
        json!([one]),
        json!([one, one]),
        json!([one, Uuid::nil()]),
    ] {
        let answer = patch(&app, id(&product), "\"3\"", json!({ "images": wrong })).await;
        assert_eq!(
            answer.expect(422).json()["errors"][0]["pointer"],
            "#/images"
        );
    }
    let turned = patch(&app, id(&product), "\"3\"", json!({ "images": [two, one] })).await;
    assert_eq!(turned.expect(200).json()["images"], json!([second, first]));

    let gone = format!("{path}/images/{}", one.as_str().unwrap());
    send(app.operate(Method::DELETE, &gone)).await.expect(204);
    send(app.operate(Method::DELETE, &gone)).await.expect(404);
    let url = renditions[0]["url"].as_str().unwrap();
    app.get(url).await.expect(404);
    let left = app.get(&path).await.expect(200);
    assert_eq!(left.header("etag"), Some("\"5\""));
    assert_eq!(left.json()["images"], json!([second]));

    // Eight, and not one more, however many come at once.
    let uploads = (0..12).map(|shade| {
        let file = picture(ImageFormat::Png, 3, 3, shade);
        upload(&app, id(&product), "image/png", file)
    });
    let mut statuses: Vec<_> = Vec::new();
    for uploads in uploads.collect::<Vec<_>>().chunks(6) {
        let answers = crowd(uploads.iter().map(|upload| upload.try_clone().unwrap())).await;
        statuses.extend(answers.iter().map(|answer| answer.status.as_u16()));
    }
    statuses.sort_unstable();
    assert_eq!(statuses, [[201; 7].as_slice(), &[409; 5]].concat());
    let full = app.get(&path).await.expect(200).json();
    assert_eq!(full["images"].as_array().unwrap().len(), 8);
    // With its images the product goes, too.
    let version = app.get(&path).await;
    let remove = app.operate(Method::DELETE, &path);
    let version = version.header("etag").unwrap();
    send(remove.header("If-Match", version)).await.expect(204);
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM image_renditions")
        .fetch_one(&mut sql(&app).await)
        .await
        .unwrap();
    assert_eq!(left, 0);
    app.finish().await;
}

#[tokio::test]
async fn what_is_no_image_is_refused_and_changes_nothing() {
    let app = App::start().await;
    let product = add(&app, &lamp("Lamp", 1999)).await.expect(201).json();
    let product = id(&product);
    let png = picture(ImageFormat::Png, 30, 30, 1);
    let mut bomb = png.clone();
    // The head claims 60,000 by 60,000; the sum over it is wrong, too, which is no better.
    bomb[16..20].copy_from_slice(&60_000_u32.to_be_bytes());
    bomb[20..24].copy_from_slice(&60_000_u32.to_be_bytes());
    let wide = picture(ImageFormat::Png, 10_001, 1, 1);
    for (media_type, file, status, code) in [
        (
            "image/png",
            b"<svg onload=alert(1)>".to_vec(),
            422,
            "validation",
        ),
        ("image/png", Vec::new(), 422, "validation"),
        ("image/jpeg", png.clone(), 422, "validation"),
        (
            "image/png",
            png[..png.len() / 2].to_vec(),
            422,
            "validation",
        ),
        ("image/png", bomb, 422, "validation"),
        ("image/png", wide, 422, "validation"),
        (
            "image/gif",
            b"GIF89a\x01\0\x01\0".to_vec(),
            415,
            "unsupported_media_type",
        ),
        (
            "image/svg+xml",
            b"<svg/>".to_vec(),
            415,
            "unsupported_media_type",
        ),
        (
            "application/json",
            b"{}".to_vec(),
            415,
            "unsupported_media_type",
        ),
        (
            "image/png",
            vec![0; 5 * 1024 * 1024 + 1],
            413,
            "payload_too_large",
        ),
    ] {
        let answer = send(upload(&app, product, media_type, file))
            .await
            .expect(status);
        assert_eq!(answer.json()["code"], code, "{media_type}");
        assert_eq!(answer.json()["outcome"], "not_applied", "{media_type}");
    }
    // Without Content-Length it is counted while it comes.
    let chunks = (0..6).map(|_| Ok::<_, std::io::Error>(vec![0; 1024 * 1024]));
    let endless = reqwest::Body::wrap_stream(futures::stream::iter(chunks));
    let path = format!("/v1/products/{product}/images");
    let request = app
        .operate(Method::POST, &path)
        .header("Content-Type", "image/png");
    send(request.body(endless)).await.expect(413);
    // Who may not, or names nothing, is told so before the file is read.
    let buyer = app.token(Uuid::from_u128(1), Role::Buyer);
    let request = app
        .request(Method::POST, &path)
        .header("Content-Type", "image/png");
    send(request.bearer_auth(buyer).body(png.clone()))
        .await
        .expect(403);
    send(upload(&app, &Uuid::nil().to_string(), "image/png", png))
        .await
        .expect(404);
    // Nobody else may send as much.
    let large = app
        .operate(Method::POST, "/v1/products")
        .body(vec![b' '; 20_000]);
    send(large.header("Content-Type", "application/json"))
        .await
        .expect(413);

    let shown = app
        .get(&format!("/v1/products/{product}"))
        .await
        .expect(200);
    assert_eq!(shown.header("etag"), Some("\"1\""));
    assert_eq!(shown.json()["images"], json!([]));
    app.finish().await;
}

#[tokio::test]
async fn products_are_found_by_words_sku_price_and_sale() {
    let app = App::start().await;
    let mut products = Vec::new();
    for (name, sku, amount) in [
        ("Blue lamp", Some("LAMP-1/B"), 100),
        ("Red lamp", Some("LAMP-2/R"), 200),
        ("Desk, oak", None, 300),
        ("O'Hara & söhne 100%", None, 400),
    ] {
        let mut product = lamp(name, amount);
        if let Some(sku) = sku {
            product["sku"] = sku.into();
        }
        products.push(add(&app, &product).await.expect(201).json());
    }
    let sale = json!({ "product_id": products[1]["id"], "allocation": 5, "per_buyer_limit": 2 });
    let sale = send(app.operate(Method::POST, "/v1/sales").json(&sale))
        .await
        .expect(201);
    let found = async |query: &str| {
        let path = format!("/v1/products?sort=price&order=asc&{query}");
        names(&app.get(&path).await.expect(200))
    };
    for (query, expected) in [
        ("q=LAMP", &["Blue lamp", "Red lamp"][..]),
        ("q=la+bl", &["Blue lamp"]),
        ("q=amp", &[]),
        (
            "q=shines",
            &["Blue lamp", "Red lamp", "Desk, oak", "O'Hara & söhne 100%"],
        ),
        ("q=lamp-2/r", &["Red lamp"]),
        ("q=o%27hara", &["O'Hara & söhne 100%"]),
        ("q=S%C3%96HNE", &["O'Hara & söhne 100%"]),
        ("q=%27%7C%21%26%28%29%3A%2A%5C", &[]),
        ("q=lamp+%7C+desk", &["Blue lamp", "Red lamp"]),
        ("sku=LAMP-2/R", &["Red lamp"]),
        ("price_min=200&price_max=300", &["Red lamp", "Desk, oak"]),
        ("currency=USD", &[]),
        ("on_sale=true", &["Red lamp"]),
        ("on_sale=true&q=desk", &[]),
        ("on_sale=false&q=lamp", &["Blue lamp"]),
    ] {
        if query == "q=lamp+%7C+desk" {
            // An operator's sign is no word.
            assert!(found(query).await.len() <= expected.len(), "{query}");
            continue;
        }
        assert_eq!(found(query).await, expected, "{query}");
    }
    // Closed, it is not for sale at once: Redis says so.
    let sale = sale.json();
    let close = app.operate(Method::POST, &format!("/v1/sales/{}/close", id(&sale)));
    send(close).await.expect(200);
    assert_eq!(found("on_sale=true").await, [""; 0]);

    let mut taken = lamp("Green lamp", 1);
    for (sku, status, code) in [
        ("LAMP-1/B", 409, "conflict"),
        ("-1", 422, "validation"),
        ("A B", 422, "validation"),
        ("", 422, "validation"),
        ("Ä1", 422, "validation"),
        (&"A".repeat(65), 422, "validation"),
    ] {
        taken["sku"] = sku.into();
        assert_eq!(
            add(&app, &taken).await.expect(status).json()["code"],
            code,
            "{sku}"
        );
    }
    let red = id(&products[1]);
    let answer = patch(&app, red, "\"1\"", json!({ "sku": "LAMP-1/B" })).await;
    assert_eq!(answer.expect(409).json()["code"], "conflict");
    let freed = patch(&app, id(&products[0]), "\"1\"", json!({ "sku": null })).await;
    assert_eq!(freed.expect(200).json()["sku"], Value::Null);
    let moved = patch(&app, red, "\"1\"", json!({ "sku": "LAMP-1/B" })).await;
    assert_eq!(moved.expect(200).json()["sku"], "LAMP-1/B");

    for query in [
        "price_min=-1",
        "price_min=2&price_max=1",
        "currency=eur",
        "on_sale=maybe",
        "sku=%27",
        &format!("q={}", "a+".repeat(11)),
    ] {
        let answer = app.get(&format!("/v1/products?{query}")).await.expect(400);
        assert_eq!(answer.json()["code"], "validation", "{query}");
    }
    app.finish().await;
}

#[tokio::test]
async fn a_standing_sale_is_shown_with_what_is_left_and_where_to_go_on() {
    let app = App::start().await;
    let product = add(&app, &lamp("Lamp", 1999)).await.expect(201).json();
    let path = format!("/v1/products/{}", id(&product));
    let plain = app.get(&path).await.expect(200);
    assert_eq!(plain.header("etag"), Some("\"1\""));

    // Neither an opening nor an end.
    let body = json!({ "product_id": product["id"], "allocation": 9, "per_buyer_limit": 9 });
    let sale = send(app.operate(Method::POST, "/v1/sales").json(&body)).await;
    let sale = sale.expect(201).json();
    assert_eq!(
        (&sale["state"], &sale["closes_at"]),
        (&json!("open"), &Value::Null)
    );

    let get = async |etag: Option<&str>, path: &str| {
        let mut request = app.request(Method::GET, path);
        if let Some(etag) = etag {
            request = request.header("If-None-Match", etag);
        }
        send(request).await
    };
    // What was plain before is another answer now.
    let shown = get(plain.header("etag"), &path).await.expect(200);
    assert_eq!(shown.header("cache-control"), Some("public, no-cache"));
    let view = shown.json();
    assert_eq!((&view["sale_id"], &view["stock"]), (&sale["id"], &json!(9)));
    let list = app.get("/v1/products").await.expect(200);
    assert_eq!(list.json()["data"][0], view);
    for (path, answer) in [(path.as_str(), &shown), ("/v1/products", &list)] {
        let known = get(answer.header("etag"), path).await.expect(304);
        assert_eq!(known.text, "");
        assert_eq!(known.header("etag"), answer.header("etag"));
    }

    // A purchase is seen by the next request, and the stream goes on from the id that it gave.
    app.buy(id(&sale), Uuid::from_u128(1), "k", 2)
        .await
        .expect(201);
    for (path, answer) in [(path.as_str(), &shown), ("/v1/products", &list)] {
        let moved = get(answer.header("etag"), path).await.expect(200);
        assert_ne!(moved.header("etag"), answer.header("etag"));
    }
    let moved = app.get(&path).await.json();
    assert_eq!(moved["stock"], 7);
    let (before, after) = (&view["stock_event_id"], &moved["stock_event_id"]);
    assert!(before.as_str() < after.as_str(), "{before} {after}");
    let mut stream = app.request(Method::GET, "/v1/events").send().await.unwrap();
    let mut text = String::new();
    let snapshot = format!("id: {}\n", after.as_str().unwrap());
    let read = async {
        while !text.contains(&snapshot) {
            text += &String::from_utf8_lossy(&stream.chunk().await.unwrap().unwrap());
        }
    };
    tokio::time::timeout(PATIENCE, read).await.unwrap();
    drop(stream);

    // The version that a change names is the one that was shown, with stock or without.
    let etag = shown.header("etag").unwrap();
    let changed = patch(&app, id(&product), etag, json!({ "name": "Lantern" })).await;
    assert_eq!(changed.expect(200).json()["stock"], 7);
    app.finish().await;
}

/// How often something has happened to the catalogue of a node.
fn count(metrics: &Answer, what: &str) -> u64 {
    let name = format!("stockade_catalogue_{what}_total ");
    let line = metrics
        .text
        .lines()
        .find_map(|line| line.strip_prefix(&name));
    line.unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_crowd_that_looks_never_reaches_postgresql() {
    let mut app = App::start().await;
    let sale = app.sale(json!({})).await;
    let product = format!("/v1/products/{}", sale["product_id"].as_str().unwrap());
    let photo = picture(ImageFormat::Png, 200, 200, 3);
    let image = upload(
        &app,
        sale["product_id"].as_str().unwrap(),
        "image/png",
        photo,
    );
    let image = send(image).await.expect(201).json();
    let image = image["renditions"][0]["url"].as_str().unwrap().to_owned();
    // Another process, which has shown nothing yet.
    app.stop().await;
    app.run().await;

    let paths = ["/v1/products", &product, &image, "/v1/products?q=lamp"];
    let before = count(&app.get("/metrics").await, "queries");
    let started = std::time::Instant::now();
    for _ in 0..10 {
        let looks = (0..100).map(|i| app.request(Method::GET, paths[i % paths.len()]));
        for answer in crowd(looks).await {
            assert_eq!(answer.status, 200, "{answer:?}");
        }
    }
    // One for each path, one for the sales of the product; and, for each second that it took, one
    // for the generation and one for the sales.
    let seconds = started.elapsed().as_secs() + 1;
    let asked = count(&app.get("/metrics").await, "queries") - before;
    assert!(asked <= 6 + 3 * seconds, "{asked} questions in {seconds} s");

    // Whoever reads the tables now waits for as long as this lasts; nobody does.
    let mut locker = sql(&app).await;
    locker
        .execute("BEGIN; LOCK products, image_renditions IN ACCESS EXCLUSIVE MODE")
        .await
        .unwrap();
    let looks = (0..200).map(|i| app.request(Method::GET, paths[i % paths.len()]));
    for answer in crowd(looks).await {
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    locker.execute("ROLLBACK").await.unwrap();
    app.finish().await;
}

#[tokio::test]
async fn a_change_is_seen_at_once_by_its_node_and_soon_by_the_others() {
    let cache = Redis::start_cache().await;
    let mut app = App::without_node(&[]).await;
    app.cache = Some(cache.address.clone());
    app.run().await;
    let other = app.node().await;
    let product = add(&app, &lamp("Lamp 0", 1)).await.expect(201).json();
    let path = format!("/v1/products/{}", id(&product));
    let elsewhere = async |path: &str| send(other.ask(app.request(Method::GET, path))).await;
    for turn in 1..=3 {
        // Both have it in memory, and in the cache between them.
        elsewhere(&path).await.expect(200);
        elsewhere("/v1/products").await.expect(200);
        let name = format!("Lamp {turn}");
        let version = format!("\"{turn}\"");
        patch(&app, id(&product), &version, json!({ "name": name }))
            .await
            .expect(200);
        assert_eq!(app.get(&path).await.json()["name"], name);
        assert_eq!(names(&app.get("/v1/products").await), [name.as_str()]);
        let soon = async {
            while names(&elsewhere("/v1/products").await.expect(200)) != [name.as_str()] {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, soon).await.unwrap();
        assert_eq!(elsewhere(&path).await.json()["name"], name);
    }

    // A node that starts finds in the cache what the others have put there.
    let late = app.node().await;
    let found = async {
        for price in 1_000.. {
            let path = format!("/v1/products?price_max={price}");
            assert_eq!(names(&app.get(&path).await), ["Lamp 3"]);
            let seen = send(late.ask(app.request(Method::GET, &path))).await;
            assert_eq!(names(&seen), ["Lamp 3"]);
            let metrics = send(late.ask(app.request(Method::GET, "/metrics"))).await;
            if count(&metrics, "cached") > 0 {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, found).await.unwrap();
    other.stop().await;
    late.stop().await;
    app.finish().await;
}

#[tokio::test]
async fn a_cache_that_is_dead_or_silent_costs_nothing_but_speed() {
    let cache = Redis::start_cache().await;
    let mut app = App::without_node(&[]).await;
    app.cache = Some(cache.address.clone());
    app.run().await;
    let product = add(&app, &lamp("Lamp 0", 1)).await.expect(201).json();
    let path = format!("/v1/products/{}", id(&product));
    let mut version = 0;
    let mut works = async |what: &str| {
        for _ in 0..3 {
            version += 1;
            let name = format!("Lamp {version}");
            let etag = format!("\"{version}\"");
            let changed = patch(&app, id(&product), &etag, json!({ "name": name }));
            changed.await.expect(200);
            let answers = crowd((0..20).map(|_| app.request(Method::GET, &path))).await;
            for answer in answers {
                assert_eq!(answer.status, 200, "{what}: {answer:?}");
                assert_eq!(answer.json()["name"], name, "{what}");
            }
            assert_eq!(
                names(&app.get("/v1/products").await.expect(200)),
                [name.as_str()],
                "{what}"
            );
        }
    };
    works("sound").await;

    cache.server.signal(Signal::STOP);
    works("silent").await;
    cache.server.signal(Signal::CONT);
    works("back").await;
    cache.server.signal(Signal::KILL);
    works("dead").await;
    app.finish().await;
}

#[tokio::test]
async fn what_a_cache_holds_that_is_no_page_is_not_shown() {
    let cache = Redis::start_cache().await;
    let mut app = App::without_node(&[]).await;
    app.cache = Some(cache.address.clone());
    app.run().await;
    let product = add(&app, &lamp("Lamp", 1)).await.expect(201).json();
    let path = format!("/v1/products/{}", id(&product));
    let sound = app.get(&path).await.expect(200).json();
    let mut wire = Wire::to(cache.address.expose_secret()).await;
    for poison in [
        "",
        "[",
        "null",
        "{}",
        "[{}]",
        "[null]",
        "\u{0}\u{1}\u{fffd}",
    ] {
        app.stop().await;
        let held = wire.ask(&["KEYS", "stockade:catalogue:*"]).await;
        assert!(!held.is_empty());
        for name in &held {
            wire.run(&["SET", name, poison]).await;
        }
        app.run().await;
        assert_eq!(app.get(&path).await.expect(200).json(), sound, "{poison:?}");
        let page = app.get("/v1/products").await.expect(200);
        assert_eq!(names(&page), ["Lamp"], "{poison:?}");
    }
    app.finish().await;
}
