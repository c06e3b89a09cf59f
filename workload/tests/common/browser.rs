//! A headless Chromium, driven through its own driver: what a person could see and do, and what
//! the browser itself had to say about it.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use axum::http::Method;
use fantoccini::actions::{InputSource, KeyAction, KeyActions};
use fantoccini::elements::Element;
use fantoccini::wd::WebDriverCompatibleCommand;
use fantoccini::{Client, ClientBuilder, Locator};
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::{Value, json};
use url::{ParseError, Url};

use crate::common;

/// What `scripts/setup.sh test` installs.
const CHROMIUM: &str = "/usr/bin/chromium";
const DRIVER: &str = "/usr/bin/chromedriver";

/// Set by `make test`: a missing browser is then a failure.
const REQUIRE: &str = "FLAMESTORM_REQUIRE_BROWSER";

/// How long anything may take to appear, on a machine with other work to do.
const PATIENCE: Duration = Duration::from_secs(20);

/// How often a driver is started.
const ATTEMPTS: usize = 3;

/// Keys by the code points that WebDriver gives them.
pub mod key {
    pub const TAB: char = '\u{e004}';
    pub const ENTER: char = '\u{e007}';
    pub const ESCAPE: char = '\u{e00c}';
}

/// A browser with one page, and all that it requested and complained of.
pub struct Browser {
    pub client: Client,
    seen: Mutex<Seen>,
    _driver: Driver,
}

#[derive(Default)]
struct Seen {
    requests: Vec<String>,
    errors: Vec<String>,
}

/// The driver with its browser, in a process group that ends when our end of the pipe closes,
/// however this process ends.
struct Driver {
    group: Child,
    stdin: Option<ChildStdin>,
    profile: PathBuf,
}

impl Driver {
    /// A driver, and its address. Now and then one dies at its start.
    fn start() -> (Self, String) {
        let started = (0..ATTEMPTS).find_map(|_| Self::try_to_start());
        started.expect("chromedriver says its port")
    }

    fn try_to_start() -> Option<(Self, String)> {
        // The shell has no part in the pipe by which the driver tells its port: it closes when the driver dies.
        let script =
            format!("{DRIVER} --port=0 </dev/null & exec >/dev/null; read -r _; kill -KILL 0");
        let mut group = Command::new("/bin/sh")
            .args(["-c", &script])
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let stdin = group.stdin.take();
        let mut lines = BufReader::new(group.stdout.take().unwrap()).lines();
        let port = lines.find_map(|line| {
            let line = line.unwrap();
            let port = line.split("successfully on port ").nth(1)?;
            Some(port.trim_end_matches('.').to_owned())
        });
        // Nobody reads on: the driver must not wait for a reader.
        std::thread::spawn(move || lines.for_each(drop));
        let profile = common::scratch("browser");
        let driver = Self {
            group,
            stdin,
            profile,
        };
        Some((driver, format!("http://127.0.0.1:{}", port?)))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        drop(self.stdin.take());
        common::wait(&mut self.group);
        let _ = std::fs::remove_dir_all(&self.profile);
    }
}

/// A command that the driver knows beside the standard's.
#[derive(Debug)]
struct Extension(&'static str, Value);

impl WebDriverCompatibleCommand for Extension {
    fn endpoint(&self, base: &Url, session: Option<&str>) -> Result<Url, ParseError> {
        base.join(&format!(
            "session/{}/{}",
            session.unwrap_or_default(),
            self.0
        ))
    }

    fn method_and_body(&self, _: &Url) -> (Method, Option<String>) {
        (Method::POST, Some(self.1.to_string()))
    }
}

impl Browser {
    /// A browser, or `None` where there is none and none is required.
    pub async fn start() -> Option<Self> {
        for program in [CHROMIUM, DRIVER] {
            if !std::path::Path::new(program).exists() {
                let missing = format!("{program} is missing: scripts/setup.sh test installs it");
                assert!(
                    std::env::var_os(REQUIRE).is_none_or(|v| v != "1"),
                    "{missing}"
                );
                eprintln!("skipped: {missing}");
                return None;
            }
        }
        let (driver, address) = tokio::task::spawn_blocking(Driver::start).await.unwrap();
        let profile = driver.profile.display();
        let capabilities = json!({
            "goog:chromeOptions": {
                "binary": CHROMIUM,
                // The sandbox cannot be had by root and in many containers; the pages are our own.
                "args": ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars",
                    "--disable-breakpad", format!("--user-data-dir={profile}")],
            },
            "goog:loggingPrefs": { "browser": "ALL", "performance": "ALL" },
        });
        let client = ClientBuilder::new(HttpConnector::new())
            .capabilities(capabilities.as_object().unwrap().clone())
            .connect(&address)
            .await
            .unwrap();
        let browser = Self {
            client,
            seen: Mutex::default(),
            _driver: driver,
        };
        browser.size(1440, 900).await;
        browser.scheme("light").await;
        Some(browser)
    }

    /// Sends a command of the DevTools protocol.
    async fn devtools(&self, command: &str, parameters: Value) -> Value {
        let body = json!({ "cmd": command, "params": parameters });
        let command = Extension("goog/cdp/execute", body);
        self.client.issue_cmd(command).await.unwrap()
    }

    /// Makes the page that large, in CSS pixels.
    pub async fn size(&self, width: u32, height: u32) {
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.devtools("Emulation.setDeviceMetricsOverride", size)
            .await;
    }

    /// Chooses `light` or `dark`, as the system would; nothing moves, so that what is there can be
    /// clicked at once.
    pub async fn scheme(&self, scheme: &str) {
        let features = json!({ "features": [
            { "name": "prefers-color-scheme", "value": scheme },
            { "name": "prefers-reduced-motion", "value": "reduce" },
        ] });
        self.devtools("Emulation.setEmulatedMedia", features).await;
    }

    /// What the window shows, as a PNG.
    pub async fn picture(&self) -> Vec<u8> {
        self.client.screenshot().await.unwrap()
    }

    /// Opens an address, from the network.
    pub async fn open(&self, address: &str) {
        // A change behind the `#` alone would load nothing.
        self.client.goto("about:blank").await.unwrap();
        self.client.goto(address).await.unwrap();
    }

    /// The element, as soon as it is there.
    pub async fn find(&self, selector: &str) -> Element {
        let wait = self.client.wait().at_most(PATIENCE);
        match wait.for_element(Locator::Css(selector)).await {
            Ok(element) => element,
            Err(error) => panic!("{selector}: {error}; the page: {}", self.text("body").await),
        }
    }

    /// Clicks as a person does: where something else is in the way, this fails.
    pub async fn click(&self, selector: &str) {
        let element = self.find(selector).await;
        // Away from the header, which stays where it is.
        let centre = "arguments[0].scrollIntoView({ block: 'center' })";
        let argument = serde_json::to_value(&element).unwrap();
        self.client.execute(centre, vec![argument]).await.unwrap();
        element
            .click()
            .await
            .unwrap_or_else(|error| panic!("{selector}: {error}"));
    }

    /// The text that is shown there now.
    pub async fn text(&self, selector: &str) -> String {
        let selector = Value::from(selector);
        let find = format!("document.querySelector({selector})?.innerText");
        let text = self.ask(&find).await;
        let text = text
            .as_str()
            .unwrap_or_else(|| panic!("there is no {selector}"));
        // Numbers and their units are held together by no-break spaces.
        text.replace('\u{a0}', " ")
    }

    /// What an expression of JavaScript gives.
    pub async fn ask(&self, expression: &str) -> Value {
        let script = format!("return ({expression});");
        self.client.execute(&script, vec![]).await.unwrap()
    }

    /// Waits until an expression of JavaScript holds, and gives its value.
    pub async fn until(&self, expression: &str) -> Value {
        self.until_within(expression, PATIENCE).await
    }

    /// The same, with another patience.
    pub async fn until_within(&self, expression: &str, patience: Duration) -> Value {
        let deadline = Instant::now() + patience;
        loop {
            let value = self.ask(expression).await;
            if !matches!(value, Value::Null | Value::Bool(false)) && value != "" {
                return value;
            }
            let late = Instant::now() > deadline;
            assert!(
                !late,
                "not in time: {expression}; the page: {}",
                self.text("body").await
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits until `text` can be seen in an element.
    pub async fn sees(&self, selector: &str, text: &str) {
        let selector = Value::from(selector);
        let text = Value::from(text);
        let find = format!(
            "[...document.querySelectorAll({selector})].some((e) => e.innerText.replaceAll('\\u00a0', ' ').includes({text}))"
        );
        self.until(&find).await;
    }

    /// Presses keys one after another.
    pub async fn press(&self, keys: &[char]) {
        let mut actions = KeyActions::new("keyboard".to_owned());
        for &value in keys {
            actions = actions
                .then(KeyAction::Down { value })
                .then(KeyAction::Up { value });
        }
        self.client.perform_actions(actions).await.unwrap();
    }

    /// How far the page reaches beyond the window's right edge, and by which elements.
    pub async fn overflow(&self) -> String {
        let find = "document.documentElement.scrollWidth <= innerWidth ? '' : \
            [...document.querySelectorAll('main *, header *')]\
            .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5)\
            .map((e) => e.outerHTML.slice(0, 80)).join('\\n') || 'the page itself'";
        self.ask(find).await.as_str().unwrap().to_owned()
    }

    async fn observe(&self) {
        for (log, take) in [
            ("browser", errors as fn(&Value) -> Option<String>),
            ("performance", requests),
        ] {
            let command = Extension("se/log", json!({ "type": log }));
            let entries = self.client.issue_cmd(command).await.unwrap();
            let entries = entries.as_array().unwrap().iter().filter_map(take);
            let mut seen = self.seen.lock().unwrap();
            match log {
                "browser" => seen.errors.extend(entries),
                _ => seen.requests.extend(entries),
            }
        }
    }

    /// What the console has called an error so far; of the network's only if `network`, for a
    /// test that takes a service away expects those.
    pub async fn errors(&self, network: bool) -> Vec<String> {
        self.observe().await;
        let errors = self.seen.lock().unwrap().errors.clone();
        errors
            .into_iter()
            .filter(|error| network || !error.starts_with("network "))
            .collect()
    }

    /// Every address requested so far.
    pub async fn requests(&self) -> Vec<String> {
        self.observe().await;
        self.seen.lock().unwrap().requests.clone()
    }
}

fn errors(entry: &Value) -> Option<String> {
    let text = |member: &str| entry[member].as_str().unwrap_or_default().to_owned();
    (entry["level"] == "SEVERE").then(|| format!("{} {}", text("source"), text("message")))
}

fn requests(entry: &Value) -> Option<String> {
    let message: Value = serde_json::from_str(entry["message"].as_str()?).ok()?;
    let event = &message["message"];
    let url = event["params"]["request"]["url"].as_str()?;
    // The browser's own first page is made of files inside the browser.
    let counts = event["method"] == "Network.requestWillBeSent" && url.starts_with("http");
    counts.then(|| url.to_owned())
}
