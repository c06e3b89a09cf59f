//! The services and the gateway, through HTTP, on a real PostgreSQL.
#![expect(clippy::unwrap_used, reason = "a failure in a helper is a failed test")]

mod common;
#[path = "common/shop.rs"]
mod shop;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::http::Request;
use common::{Watched, get, scratch, send, send_with};
use http_body_util::Full;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use shop::{PRODUCTS, SERVICES, Shop, exchange, post, post_text, service, start, start_demo};
use sqlx::{Connection, PgConnection, Row};
use workload::services::{inventory, order, product};

/// The ids of the products that an answer lists.
fn ids(answer: &Value) -> Vec<i64> {
    let products = answer["products"].as_array().unwrap();
    products.iter().map(|p| p["id"].as_i64().unwrap()).collect()
}

/// Pages follow each other without gaps, and a department is a part of the whole.
#[tokio::test]
async fn the_catalogue_has_pages() {
    let service = start(service("product", &common::database().await)).await;
    let at = |query: &str| format!("{}/products?{query}", service.announced);
    let mut seen = Vec::new();
    let mut next = Some(0);
    while let Some(after) = next {
        let page = get(&at(&format!("after={after}&limit=90"))).await.json();
        assert_eq!(page["count"], ids(&page).len());
        seen.extend(ids(&page));
        next = page["next"].as_i64();
    }
    assert_eq!(seen, (1..=PRODUCTS).collect::<Vec<_>>());

    let audio = get(&at("department=Audio&limit=100")).await.json();
    let products = audio["products"].as_array().unwrap();
    assert!((20..100).contains(&products.len()), "{}", products.len());
    assert!(products.iter().all(|p| p["department"] == "Audio"));
    assert_eq!(audio["next"], Value::Null);
    let none = get(&at("department=None")).await.json();
    assert_eq!(none["count"], 0);
    let wrong = get(&at("limit=0")).await;
    assert_eq!(wrong.problem(400), "limit_out_of_range");
}

/// Several words find what any of them finds, in each of the services.
#[tokio::test]
async fn any_of_several_words() {
    let shop = Shop::open().await;
    for path in [
        "/api/products/search",
        "/api/orders/popular-products",
        "/api/inventory/low-stock",
    ] {
        let find = async |query: &str| {
            let found = shop.get(&format!("{path}?limit=100&{query}")).await.json();
            ids(&found).into_iter().collect::<BTreeSet<_>>()
        };
        // Words of one department each, so that none of the lists is cut off.
        let (camera, dress) = (find("q=magnesium").await, find("q=linen").await);
        assert!(!camera.is_empty() && !dress.is_empty(), "{path}");
        let both: BTreeSet<_> = camera.union(&dress).copied().collect();
        assert_eq!(find("any=Magnesium,%20LINEN").await, both, "{path}");
        assert_eq!(find("any=nothing,like%25this").await, BTreeSet::new());

        for (query, code) in [
            ("", "q_missing"),
            ("q=x", "q_too_short"),
            ("any=kite,", "q_missing"),
            ("q=kite&any=lens", "q_and_any"),
            ("any=aa,bb,cc,dd,ee,ff,gg,hh,ii", "too_many_words"),
            ("q=kite&limit=0", "limit_out_of_range"),
            ("q=kite&limit=x", "bad_query"),
        ] {
            let answer = shop.get(&format!("{path}?{query}")).await;
            assert_eq!(answer.problem(400), code, "{path}?{query}");
        }
    }
}

/// An order is placed as a whole, at today's prices, and is the newest in its customer's history.
#[tokio::test]
async fn an_order_is_placed() {
    let url = common::database().await;
    let orders = start(service("order", &url)).await;
    let at = |path: &str| format!("{}{path}", orders.announced);
    let popular = at("/orders/popular-products?q=the&limit=100");
    let before = get(&popular).await.json();
    let chosen = &before["products"][0];
    let (id, price) = (&chosen["id"], chosen["price_cents"].as_i64().unwrap());

    let items = json!([{"product_id": id, "quantity": 3}, {"product_id": id, "quantity": 2}]);
    let order = json!({"customer_id": 7, "items": items});
    let placed = post(&at("/orders"), &order).await;
    assert_eq!(placed.status, 201, "{:?}", placed.body);
    let placed = placed.json();
    assert_eq!(placed["status"], "placed");
    assert_eq!(placed["total_cents"], 5 * price);

    let history = get(&at("/orders/history?customer_id=7")).await.json();
    let newest = &history["orders"][0];
    assert_eq!(newest["id"], placed["id"]);
    assert_eq!(newest["total_cents"], 5 * price);
    let quantities = newest["items"].as_array().unwrap().iter();
    let quantities: Vec<_> = quantities.map(|item| item["quantity"].clone()).collect();
    assert_eq!(quantities, [3, 2]);
    let times = history["orders"].as_array().unwrap().iter();
    let times: Vec<_> = times
        .map(|o| o["ordered_at"].as_str().unwrap().to_owned())
        .collect();
    assert!(times.is_sorted_by(|a, b| a >= b), "{times:?}");
    assert!(
        times[0].ends_with('Z') && times[0].contains('T'),
        "{times:?}"
    );

    // What is ordered becomes more popular, and stands in that order.
    let after = get(&popular).await.json();
    let units = |found: &Value, id: &Value| {
        let mut products = found["products"].as_array().unwrap().iter();
        products.find(|p| p["id"] == *id).unwrap()["units"].as_i64()
    };
    assert_eq!(units(&after, id), units(&before, id).map(|n| n + 5));
    let all = after["products"].as_array().unwrap().iter();
    let all: Vec<_> = all.map(|p| p["units"].as_i64().unwrap()).collect();
    assert!(all.is_sorted_by(|a, b| a >= b), "{all:?}");
}

/// Each wrong order is refused with a problem of its own, and leaves nothing behind.
#[tokio::test]
async fn wrong_orders_are_explained() {
    let url = common::database().await;
    let orders = start(service("order", &url)).await;
    let at = |path: &str| format!("{}{path}", orders.announced);
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let count = async |connection: &mut PgConnection| {
        let all = "SELECT (SELECT count(*) FROM orders) + (SELECT count(*) FROM order_items)";
        sqlx::query_scalar::<_, i64>(all)
            .fetch_one(connection)
            .await
            .unwrap()
    };
    let before = count(&mut connection).await;
    let item = |product: i64, quantity: i64| json!({"product_id": product, "quantity": quantity});
    let order = |customer: i64, items: Value| json!({"customer_id": customer, "items": items});
    for (body, status, code) in [
        (order(1, json!([])), 400, "items_out_of_range"),
        (
            order(1, json!(vec![item(1, 1); 21])),
            400,
            "items_out_of_range",
        ),
        (order(1, json!([item(1, 0)])), 400, "quantity_out_of_range"),
        (
            order(1, json!([item(1, 1), item(2, 101)])),
            400,
            "quantity_out_of_range",
        ),
        (order(999_999, json!([item(1, 1)])), 422, "no_such_customer"),
        (
            order(1, json!([item(1, 1), item(501, 1)])),
            422,
            "no_such_product",
        ),
        (json!({"customer_id": 1}), 422, "bad_body"),
        (json!({"customer_id": "1", "items": []}), 422, "bad_body"),
        (order(1, json!([item(1, 9_999_999_999)])), 422, "bad_body"),
    ] {
        let answer = post(&at("/orders"), &body).await;
        assert_eq!(answer.problem(status), code, "{body}");
    }
    let broken = post_text(&at("/orders"), "{").await;
    assert_eq!(broken.problem(400), "bad_body");
    let large = post_text(&at("/orders"), &" ".repeat(100_000)).await;
    assert_eq!(large.problem(413), "bad_body");
    let untyped = Request::post(at("/orders")).body(Full::new(Bytes::from_static(b"{}")));
    assert_eq!(exchange(untyped.unwrap()).await.problem(415), "bad_body");
    assert_eq!(get(&at("/orders")).await.problem(405), "no_such_method");
    for (query, status, code) in [
        ("", 400, "bad_query"),
        ("?customer_id=x", 400, "bad_query"),
        ("?customer_id=1&limit=101", 400, "limit_out_of_range"),
        ("?customer_id=999999", 404, "no_such_customer"),
    ] {
        let answer = get(&at(&format!("/orders/history{query}"))).await;
        assert_eq!(answer.problem(status), code, "{query}");
    }
    assert_eq!(count(&mut connection).await, before);
}

/// What is reserved is not available any more, and no piece is promised twice.
#[tokio::test]
async fn stock_is_reserved_once() {
    let stocks = start(service("inventory", &common::database().await)).await;
    let at = |path: &str| format!("{}{path}", stocks.announced);
    let check = async |id: i64| get(&at(&format!("/inventory/check/{id}"))).await.json();
    let mut id = 1;
    while check(id).await["available"].as_i64().unwrap() < 30 {
        id += 1;
    }
    let before = check(id).await;
    let available = before["available"].as_i64().unwrap();
    assert_eq!(before["product_id"], id);
    assert_eq!(before["on_hand"], available);

    let reserve = |quantity: i64| {
        let uri = at("/inventory/reservations");
        async move { post(&uri, &json!({"product_id": id, "quantity": quantity})).await }
    };
    let one = reserve(1).await;
    assert_eq!(one.status, 201);
    assert_eq!(one.json()["available"], available - 1);

    // More at once than there is.
    let quantity = available / 10;
    let reservations: Vec<_> = (0..20).map(|_| tokio::spawn(reserve(quantity))).collect();
    let mut granted = 0;
    for reservation in reservations {
        let answer = reservation.await.unwrap();
        if answer.status == 201 {
            granted += quantity;
        } else {
            assert_eq!(answer.problem(409), "out_of_stock");
        }
    }
    let after = check(id).await;
    assert_eq!(after["reserved"], granted + 1);
    assert_eq!(after["available"], available - granted - 1);
    assert!(after["available"].as_i64().unwrap() < quantity, "{after}");
}

/// Products that run low do, and wrong questions about stock are explained.
#[tokio::test]
async fn what_runs_low_is_found() {
    let stocks = start(service("inventory", &common::database().await)).await;
    let at = |path: &str| format!("{}{path}", stocks.announced);
    let low = get(&at("/inventory/low-stock?q=the&limit=100"))
        .await
        .json();
    let products = low["products"].as_array().unwrap();
    assert!(products.len() > 10);
    for product in products {
        let available = product["available"].as_i64().unwrap();
        assert!(
            available < product["reorder_level"].as_i64().unwrap(),
            "{product}"
        );
    }
    for (path, status, code) in [
        ("/inventory/check/x", 400, "bad_id"),
        ("/inventory/check/501", 404, "no_such_product"),
        ("/inventory", 404, "no_such_page"),
    ] {
        assert_eq!(get(&at(path)).await.problem(status), code, "{path}");
    }
    for (body, status, code) in [
        (
            json!({"product_id": 1, "quantity": 0}),
            400,
            "quantity_out_of_range",
        ),
        (
            json!({"product_id": 1, "quantity": 101}),
            400,
            "quantity_out_of_range",
        ),
        (
            json!({"product_id": 501, "quantity": 1}),
            422,
            "no_such_product",
        ),
        (json!({"product_id": 1}), 422, "bad_body"),
    ] {
        let answer = post(&at("/inventory/reservations"), &body).await;
        assert_eq!(answer.problem(status), code, "{body}");
    }
}

/// What a service says, the gateway says: answers and problems alike.
#[tokio::test]
async fn the_gateway_hands_through() {
    let shop = Shop::open().await;
    for (service, path) in [
        (&shop.product, "/products?limit=3"),
        (&shop.product, "/products/search?q=kite&limit=3"),
        (&shop.product, "/products/42"),
        (&shop.product, "/products/501"),
        (&shop.product, "/products/search?q=%26%23&limit=2"),
        (&shop.order, "/orders/history?customer_id=3"),
        (&shop.order, "/orders/popular-products?any=kite,lens"),
        (&shop.order, "/orders/history"),
        (&shop.inventory, "/inventory/check/42"),
        (&shop.inventory, "/inventory/low-stock?q=kite"),
    ] {
        let own = get(&format!("{}{path}", service.announced)).await;
        let through = shop.get(&format!("/api{path}")).await;
        assert_eq!(through.status, own.status, "{path}");
        assert_eq!(through.kind, own.kind, "{path}");
        assert_eq!(through.body, own.body, "{path}");
    }
    let order = json!({"customer_id": 3, "items": [{"product_id": 1, "quantity": 1}]});
    assert_eq!(shop.post("/api/orders", &order).await.status, 201);
    let reservation = json!({"product_id": 501, "quantity": 1});
    let answer = shop.post("/api/inventory/reservations", &reservation).await;
    assert_eq!(answer.problem(422), "no_such_product");
    assert_eq!(shop.get("/api/nothing").await.problem(404), "no_such_page");
    assert_eq!(shop.get("/api/orders").await.problem(405), "no_such_method");
    // Not a way to what the services keep to themselves.
    assert_eq!(
        shop.get("/api/debug/traces").await.problem(404),
        "no_such_page"
    );

    let status = shop.get("/api/status").await.json();
    let services = status["services"].as_array().unwrap();
    let names: Vec<_> = services
        .iter()
        .map(|s| s["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, [product::NAME, order::NAME, inventory::NAME]);
    for service in services {
        assert_eq!(service["up"], true);
        assert_eq!(service["health"]["pool"]["max"], 15);
        assert_eq!(service["health"]["demo"], true);
    }
    assert_eq!(status["database"]["search_index"], false);
    assert!(
        status["database"]["name"]
            .as_str()
            .unwrap()
            .starts_with("shop_")
    );
    assert!(status["database"]["backends_active"].is_u64(), "{status}");
}

/// A service that is down is named, and the rest of the shop is open.
#[tokio::test]
async fn a_service_that_is_down_is_named() {
    let mut shop = Shop::open().await;
    shop.order.signal(Signal::SIGKILL);
    shop.order.wait();
    let answer = shop.get("/api/orders/popular-products?q=kite").await;
    assert_eq!(answer.problem(502), "service_unreachable");
    let detail = answer.json()["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains("order-service"), "{detail}");
    assert_eq!(shop.get("/api/products/42").await.status, 200);
    assert_eq!(shop.get("/api/inventory/check/42").await.status, 200);

    let health = shop.get("/health").await;
    assert_eq!(health.status, 200);
    let health = health.json();
    assert_eq!(health["status"], "degraded");
    let up = health["services"].as_array().unwrap().iter();
    let up: Vec<_> = up.map(|s| s["up"].as_bool().unwrap()).collect();
    assert_eq!(up, [true, false, true]);

    // The others are reset all the same.
    let delay = json!({"delay_ms": 5});
    let answer = shop.post("/api/demo/enable-slow-queries", &delay).await;
    assert_eq!(answer.problem(502), "service_unreachable");
    let health = get(&format!("{}/health", shop.inventory.announced)).await;
    assert_eq!(health.json()["simulation"]["slow_queries_ms"], 5);
    let answer = shop.post("/api/demo/reset", &json!({})).await;
    assert_eq!(answer.problem(502), "service_unreachable");
    let health = get(&format!("{}/health", shop.inventory.announced)).await;
    assert_eq!(health.json()["simulation"]["slow_queries_ms"], Value::Null);
}

/// A service that takes a request and says nothing does not keep the gateway's visitor for ever.
#[tokio::test]
async fn a_silent_service_is_named() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let gateway = start(shop::gateway(&url, &url, &url)).await;
    let start = Instant::now();
    let search = format!("{}/api/products/42", gateway.announced);
    let health = format!("{}/health", gateway.announced);
    let (answer, health) = tokio::join!(get(&search), get(&health));
    assert_eq!(answer.problem(504), "service_unreachable");
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(text.contains("product-service"), "{text}");
    assert!(
        start.elapsed() >= Duration::from_secs(8),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(health.json()["status"], "degraded");
}

/// A trace goes through the gateway into the service and its statement.
#[tokio::test]
async fn a_trace_goes_through() {
    let shop = Shop::open().await;
    let id = "0af7651916cd43dd8448eb211c80319c";
    let parent = format!("00-{id}-b7ad6b7169203331-01");
    let search = shop.at("/api/products/search?q=kite");
    let answer = send_with("GET", &search, &[("traceparent", parent)]).await;
    assert_eq!(answer.unwrap().status, 200);
    let trace = shop.get(&format!("/api/traces/{id}")).await.json();
    let spans = trace["spans"].as_array().unwrap();
    let of = |service: &str, kind: &str| {
        let mut found = spans.iter();
        let is = |s: &&Value| s["service"] == service && s["kind"] == kind;
        found
            .find(is)
            .unwrap_or_else(|| panic!("no {kind} of {service}: {trace:#}"))
    };
    let served = of("api-gateway", "server");
    assert_eq!(served["parent_span_id"], "b7ad6b7169203331");
    let asked = of("api-gateway", "client");
    assert_eq!(asked["parent_span_id"], served["span_id"]);
    let service = of("product-service", "server");
    assert_eq!(service["parent_span_id"], asked["span_id"]);
    let statement = of("product-service", "client");
    assert_eq!(statement["parent_span_id"], service["span_id"]);
    let name = statement["name"].as_str().unwrap();
    assert!(
        name.starts_with("SELECT ") && name.ends_with(".products"),
        "{name}"
    );

    let traces = shop.get("/api/traces?limit=500").await.json();
    let mut traces = traces.as_array().unwrap().iter();
    assert!(traces.any(|t| t["trace_id"] == id));
    assert_eq!(
        shop.get("/api/traces/xyz").await.problem(400),
        "bad_trace_id"
    );
    let other = "f".repeat(32);
    let unknown = shop.get(&format!("/api/traces/{other}")).await;
    assert_eq!(unknown.problem(404), "no_such_trace");
}

/// Any number of services of each kind may start at once on an empty database.
#[tokio::test]
async fn all_services_may_start_at_once() {
    let url = common::database().await;
    let starting: Vec<_> = (0..9)
        .map(|n| tokio::spawn(start(service(SERVICES[n % 3], &url))))
        .collect();
    let mut services: Vec<Watched> = Vec::new();
    for service in starting {
        services.push(service.await.unwrap());
    }
    for (n, service) in services.iter().enumerate() {
        let path = [
            "/products/500",
            "/orders/history?customer_id=25",
            "/inventory/check/500",
        ];
        let answer = get(&format!("{}{}", service.announced, path[n % 3])).await;
        assert_eq!(answer.status, 200, "{:?}", answer.body);
    }
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let counts = sqlx::query(
        "SELECT (SELECT count(*) FROM products), (SELECT count(*) FROM stock), \
                (SELECT count(*) FROM customers), (SELECT count(*) FROM orders), \
                (SELECT count(*) FROM catalogue)",
    );
    let counts = counts.fetch_one(&mut connection).await.unwrap();
    let counts: Vec<i64> = (0..5).map(|n| counts.get(n)).collect();
    assert_eq!(counts, [PRODUCTS, PRODUCTS, PRODUCTS / 20, PRODUCTS / 4, 1]);
}

/// Without `--demo` nothing can be simulated, and with it not by another page in a browser.
#[tokio::test]
async fn the_demo_is_off_by_default() {
    let url = common::database().await;
    let plain = start(service("product", &url)).await;
    let demo = start_demo("product", &url).await;
    for path in [
        "/demo/enable-slow-queries",
        "/demo/enable-pool-exhaustion",
        "/demo/reset",
        "/demo/index",
    ] {
        let off = post(&format!("{}{path}", plain.announced), &json!({})).await;
        assert_eq!(off.problem(404), "demo_disabled", "{path}");
        let origin = [("origin", "http://evil.example".to_owned())];
        let foreign = send_with("POST", &format!("{}{path}", demo.announced), &origin).await;
        assert_eq!(foreign.unwrap().problem(403), "cross_origin", "{path}");
        let got = send("GET", &format!("{}{path}", demo.announced)).await;
        assert_eq!(got.unwrap().problem(405), "no_such_method", "{path}");
    }
    let health = get(&format!("{}/health", plain.announced)).await.json();
    assert_eq!(health["demo"], false);
}

/// The heavy queries read every description without the index, and none with it.
#[tokio::test]
async fn the_index_serves_all_three() {
    let url = common::database().await;
    let service = start_demo("product", &url).await;
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let index = format!("{}/demo/index", service.announced);
    let state = format!("{}/debug/database", service.announced);
    let searches = [
        (product::SEARCH, false),
        (product::SEARCH_ANY, true),
        (order::POPULAR.text, true),
        (inventory::LOW_STOCK.text, true),
    ];
    for (text, any) in searches {
        let plan = plan(&mut connection, text, any).await;
        assert!(plan.contains("Seq Scan on products"), "{plan}");
    }
    // Twice is as good as once.
    for _ in 0..2 {
        let made = post(&index, &json!({"action": "create"})).await.json();
        assert_eq!(made["search_index"], true);
    }
    assert_eq!(get(&state).await.json()["search_index"], true);
    // So small a table would be read as a whole.
    let small = "SET enable_seqscan = off";
    sqlx::raw_sql(small).execute(&mut connection).await.unwrap();
    for (text, any) in searches {
        let plan = plan(&mut connection, text, any).await;
        assert!(plan.contains(workload::index::NAME), "{plan}");
    }
    let search = format!("{}/products/search?q=kite", service.announced);
    let with = get(&search).await.json();
    for _ in 0..2 {
        let dropped = post(&index, &json!({"action": "drop"})).await.json();
        assert_eq!(dropped["search_index"], false);
    }
    assert_eq!(get(&state).await.json()["search_index"], false);
    assert_eq!(get(&search).await.json(), with);
    for body in [
        json!({}),
        json!({"action": "explode"}),
        json!({"action": "create", "x": 1}),
    ] {
        assert_eq!(post(&index, &body).await.problem(400), "bad_body", "{body}");
    }
}

/// How PostgreSQL would search for a rare word.
async fn plan(connection: &mut PgConnection, text: &'static str, any: bool) -> String {
    let explain = sqlx::AssertSqlSafe(format!("EXPLAIN {text}"));
    let query = match any {
        true => sqlx::query(explain).bind(vec!["%zither%"]),
        false => sqlx::query(explain).bind("zither"),
    };
    let rows = query.bind(20_i64).fetch_all(connection).await.unwrap();
    let lines: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    lines.join("\n")
}

/// The index by the command line.
#[tokio::test]
async fn the_index_by_hand() {
    let url = common::database().await;
    let service = start(service("product", &url)).await;
    let state = format!("{}/debug/database", service.announced);
    for (action, there) in [("create", true), ("drop", false)] {
        let mut command = common::program("index");
        command.arg(action).env("DATABASE_URL", &url);
        let ran = tokio::task::spawn_blocking(move || common::run(&mut command));
        let (status, stdout, stderr) = ran.await.unwrap();
        assert!(status.success(), "{stderr}");
        assert!(stdout.contains(workload::index::NAME), "{stdout}");
        assert_eq!(get(&state).await.json()["search_index"], there);
    }
}

/// Pictures are listed and shown, and nothing else of the machine is.
#[tokio::test]
async fn pictures_are_shown() {
    let directory = scratch("pictures");
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("storm.svg"), "<svg/>").unwrap();
    std::fs::write(directory.join("storm.pb.gz"), "no picture").unwrap();
    std::fs::create_dir(directory.join("folder.svg")).unwrap();
    let nowhere = "http://127.0.0.1:1";
    let mut command = shop::gateway(nowhere, nowhere, nowhere);
    command.arg("--flamegraphs").arg(&directory);
    let gateway = start(command).await;
    let at = |path: &str| format!("{}/flamegraphs{path}", gateway.announced);
    let list = get(&at("")).await.json();
    assert_eq!(list.as_array().unwrap().len(), 1, "{list}");
    assert_eq!(
        (&list[0]["file"], &list[0]["bytes"]),
        (&json!("storm.svg"), &json!(6))
    );
    let picture = get(&at("/storm.svg")).await;
    assert_eq!(
        (picture.status.as_u16(), &picture.body[..]),
        (200, &b"<svg/>"[..])
    );
    assert_eq!(picture.kind, "image/svg+xml");
    for path in [
        "/storm.pb.gz",
        "/other.svg",
        "/folder.svg",
        "/..%2f..%2fetc%2fpasswd",
        "/..%2fpictures%2fstorm.svg",
    ] {
        assert_eq!(
            get(&at(path)).await.problem(404),
            "no_such_picture",
            "{path}"
        );
    }
    std::fs::remove_dir_all(directory).unwrap();
}
