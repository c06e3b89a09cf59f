//! The shop's pages in a real browser.
#![expect(clippy::unwrap_used, reason = "a failure in a helper is a failed test")]

#[path = "common/browser.rs"]
mod browser;
mod common;

use browser::Browser;

#[tokio::test]
async fn scratch() {
    let Some(browser) = Browser::start().await else {
        return;
    };
    browser.open("http://127.0.0.1:8099/#/demo").await;
    browser.click("#do-storm").await;
    println!("{}", browser.text("dialog").await);
    browser.press(&['\u{e00c}']).await;
    browser.until("!document.querySelector('dialog')").await;
    println!(
        "{:?} {:?}",
        browser.errors(true).await,
        browser.requests().await
    );
    browser.size(360, 740).await;
    println!("over: {}", browser.overflow().await);
    std::fs::write("/tmp/pages-scratch/shots/t.png", browser.picture().await).unwrap();
}
